"Loss curves of the plain and the fast methods of this package over the same seeds: do they differ by more than chance?"
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from fastai.torch_core import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_line, method_options, options, parse, save, seeds_option
from methods import OURS, our_dls
from rounds import get_source
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe

PLAIN = 'item-plain'  # the reference: Albumentations, float32, torch's own layers
MEASURES = {'train_loss': '{:.4f}', 'valid_loss': '{:.4f}', 'valid_accuracy': '{:.4f}'}


def history(key, seed, epochs, source):
    "A row of measures for each epoch of a run that is fixed by `seed`"
    set_seed(seed)
    augment, compute = key.split('-')
    recipe = get_recipe('stated', epochs=epochs, augment=augment, compute=compute)
    learn = s9_learner(our_dls(source, recipe.bs, 0, augment, seed), recipe)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    names = learn.recorder.metric_names[1:]
    return [{k: v for k, v in zip(names, row) if k in MEASURES} for row in learn.recorder.values]


def welch(a, b):
    "The difference of the means of `a` and `b` in standard errors (Welch's t)"
    error = (stdev(a)**2/len(a) + stdev(b)**2/len(b))**0.5
    return (mean(a) - mean(b))/error if error else 0.


def show(runs, epochs):
    "Mean and deviation of each method, epoch and measure, and the difference from the plain one in standard errors"
    print('| epoch | measure | ' + ' | '.join(f'{OURS[k][0]} | t' for k in runs) + ' |')
    print('|---|---|' + '---|---|'*len(runs))
    for e, (nm, form) in product(range(epochs), MEASURES.items()):
        values = {k: [h[e][nm] for h in hs] for k, hs in runs.items()}
        cells = [f'{form.format(mean(v))} ± {form.format(stdev(v))} | {"" if k == PLAIN else f"{welch(v, values[PLAIN]):+.1f}"}'
                 for k, v in values.items()]
        print(f'| {e + 1} | {nm} | ' + ' | '.join(cells) + ' |')


def main():
    p = options(__doc__)
    method_options(p, [PLAIN, 'item-fast', 'batch-fast'])
    seeds_option(p, [0, 1, 2])
    p.add_argument('--epochs', type=int, default=3, help='epochs a run')
    p.add_argument('--images', type=int, help='training images, drawn once; not given: all')
    args = parse(p)
    if len(args.seeds) < 2: p.error('--seeds names one seed, but a deviation needs 2 or more')
    if PLAIN not in args.methods: p.error(f'--methods must name {PLAIN}, the reference')
    source, runs = get_source(args.data, args.images), {k: [] for k in args.methods}
    for seed, key in product(args.seeds, runs):
        runs[key].append(history(key, seed, args.epochs, source))
        rows, settings = runs[key][-1], dict(method=key, seed=seed, recipe='stated', images=source.n_train)
        save([make_line(OURS[key][0], nm, 'a row an epoch', [r[nm] for r in rows], settings) for nm in MEASURES], args.out)
        print(f'seed {seed}  {OURS[key][0]}: train_loss', *(f'{r["train_loss"]:.4f}' for r in rows), file=sys.stderr, flush=True)
    show(runs, args.epochs)


if __name__ == '__main__': main()
