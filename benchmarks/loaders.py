"Images per second of the training loaders of CIFAR-10, augmented and normalised: float32 batches on the CPU"
import sys
from itertools import product

from common import Contestant, data_options, get_source, interleave, lines_of, options, parse, save, show
from competitors import IN_ONE_PROCESS, LOADERS, has_kornia, loader_name, make_pass


def line_up(args):
    "(name, workers) of those who take part"
    names = args.contestants
    if 'kornia' in names and not has_kornia():
        print("kornia is left out: it is not installed (pip install 'kornia>=0.9')", file=sys.stderr)
        names = [nm for nm in names if nm != 'kornia']
    return [(nm, w) for w, nm in product(args.workers, names) if w == 0 or nm not in IN_ONE_PROCESS]


def contestant(key, workers, bs, source, threads):
    "The loader `key` as one who takes part"
    kwargs = dict(key=key, source=source, bs=bs, workers=workers)
    settings = dict(contestant=key, bs=bs, workers=workers, policy='reference', images=source.n_train)
    return Contestant(loader_name(key, workers), make_pass, kwargs, settings, threads)


def main():
    p = data_options(options(__doc__, reps=5), list(LOADERS))
    p.add_argument('--images', type=int, help='training images, drawn once; not given: all')
    p.add_argument('--workers', type=int, nargs='+', default=[0, 2], metavar='N', help='processes that make batches')
    p.add_argument('--bs', type=int, nargs='+', default=[128], metavar='N', help='images a batch')
    args = parse(p)
    source = get_source(args.data, args.images)
    for bs in args.bs:
        group = [contestant(key, w, bs, source, args.threads) for key, w in line_up(args)]
        interleave(group, args.reps)
        lines = lines_of(group, {'loading': 'images/s'})
        save(lines, args.out)
        print(f'\nbatches of {bs}, {source.n_train:,} images')
        show(lines, loader_name('fastai', 0))


if __name__ == '__main__': main()
