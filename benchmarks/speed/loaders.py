"Images per second of the training loaders of CIFAR-10, augmented and normalised: float32 batches on the CPU"
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import method_options, options, parse, save, show
from methods import IN_ONE_PROCESS, LOADERS, has_kornia, loader_name, make_pass
from rounds import Method, get_source, interleave, lines_of


def pairs(args):
    "(name, workers) of the loaders to measure"
    names = args.methods
    if 'kornia' in names and not has_kornia():
        print("kornia is left out: it is not installed (pip install 'kornia>=0.9')", file=sys.stderr)
        names = [nm for nm in names if nm != 'kornia']
    return [(nm, w) for w, nm in product(args.workers, names) if w == 0 or nm not in IN_ONE_PROCESS]


def method(key, workers, bs, source, threads):
    "The loader `key`, to be measured"
    kwargs = dict(key=key, source=source, bs=bs, workers=workers)
    settings = dict(method=key, bs=bs, workers=workers, policy='reference', images=source.n_train)
    return Method(loader_name(key, workers), make_pass, kwargs, settings, threads)


def main():
    p = options(__doc__, repeats=5)
    method_options(p, list(LOADERS))
    p.add_argument('--images', type=int, help='training images, drawn once; not given: all')
    p.add_argument('--workers', type=int, nargs='+', default=[0, 2], metavar='N', help='processes that make batches')
    p.add_argument('--bs', type=int, nargs='+', default=[128], metavar='N', help='images a batch')
    args = parse(p)
    source = get_source(args.data, args.images)
    for bs in args.bs:
        group = [method(key, w, bs, source, args.threads) for key, w in pairs(args)]
        interleave(group, args.repeats)
        lines = lines_of(group, {'loading': 'images/s'})
        save(lines, args.out)
        print(f'\nbatches of {bs}, {source.n_train:,} images')
        show(lines, loader_name('fastai', 0))


if __name__ == '__main__': main()
