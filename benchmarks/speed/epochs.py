"Seconds of one epoch on CIFAR-10 with the test at its end, and of its training part"
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import method_options, options, parse, save, show
from methods import EPOCHS, RECIPE
from rounds import Method, get_source, interleave, lines_of
from s9_fastai.app.recipe import get_recipe


def method(key, bs, source, threads):
    "The training called `key`, to be measured"
    title, make, workers = {**EPOCHS, **RECIPE}[key]
    policy = get_recipe(key.removeprefix('recipe-')).policy if key.startswith('recipe-') else 'reference'
    settings = dict(method=key, bs=bs, workers=workers, policy=policy, images=source.n_train,
                    test_images=source.n_test)
    return Method(title, make, dict(source=source, bs=bs, workers=workers), settings, threads)


def measure(args, images):
    "One run with `images` training images: lines and tables"
    source = get_source(args.data, images)
    group = [method(key, args.bs, source, args.threads) for key in args.methods]
    interleave(group, args.repeats)
    lines = lines_of(group, {'epoch': 's', 'training': 's'})
    save(lines, args.out)
    print(f'\n{source.n_train:,} training images, {source.n_test:,} test images, batches of {args.bs}')
    epochs = [o for o in lines if o['measure'] == 'epoch']
    fastai = [o for o in epochs if o['settings']['method'].startswith('fastai')]
    # the better of fastai's numbers of workers
    if epochs: show(epochs, min(fastai, key=lambda o: o['median'])['what'] if fastai else '')
    show([o for o in lines if o['measure'] == 'training'], EPOCHS['bare'][0])


def main():
    p = options(__doc__, repeats=3)
    method_options(p, [*EPOCHS, *RECIPE])
    p.set_defaults(methods=[*EPOCHS])  # whole recipes only where they are named
    p.add_argument('--images', type=int, nargs='+', default=[None], metavar='N',
                   help='training images, drawn once; several numbers are measured one after the other; not given: all')
    p.add_argument('--bs', type=int, default=128, help='images a batch')
    args = parse(p)
    for images in args.images: measure(args, images)


if __name__ == '__main__': main()
