"""Trains candidates for the recipe `sample` on the 2,000 embedded images, and judges them on images held out of these.

A line for each candidate and seed. The test images are read with `--held-out 0` only: for the one that was chosen.
"""
import multiprocessing
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from time import perf_counter

import pandas as pd
import torch
from fastai.torch_core import set_seed

from accuracy import curves
from common import facts, here, save
from s9_fastai.data import cifar_dls
from s9_fastai.fast import number_format
from s9_fastai.learner import RECIPES, get_recipe, s9_learner

changes = {  # of `fast` with 28 epochs, batches of 64 and a rate of 0.6, unless a number is named
    'as it is': {}, 'rate 0.3': dict(lr=0.3), 'rate 1': dict(lr=1.), '40 epochs': dict(epochs=40),
    'batches of 128': dict(epochs=36, bs=128), 'batches of 128, rate 1': dict(epochs=36, bs=128, lr=1.),
    'batches of 32': dict(epochs=18, bs=32), 'label smoothing 0.1': dict(label_smoothing=0.1),
    'averages three times as old': dict(average=0.09), 'without averages': dict(average=0.), 'momentum 0.8': dict(mom=0.8),
    'rise in two fifths': dict(rise=0.4), 'ten times the weight decay': dict(wd=1e-2), 'dropout 0.05': dict(dropout=0.05),
    'flips by turns': dict(policy='alt_flip_crop'), 'cutout': dict(policy='flip_crop_cutout'), 'no augmentation': dict(policy='none')}


def recipe_of(what, held_out):
    if what in RECIPES: return get_recipe(what, held_out=held_out)
    return get_recipe('fast', **{'epochs': 28, 'bs': 64, 'lr': 0.6, 'held_out': held_out, **changes[what]})


def train(todo, args):
    "The result of one candidate from one seed, as a line"
    what, seed = todo
    torch.set_num_threads(args.threads)
    facts()  # before the training: how busy the machine is
    recipe = recipe_of(what, args.held_out)
    set_seed(seed)
    dls = cifar_dls('sample', recipe.bs, seed=seed, policy=recipe.policy, augment=recipe.augment,
                    held_out=recipe.held_out, device=torch.device('cpu'))
    with TemporaryDirectory() as tmp:  # the command saves checkpoints too
        learn = s9_learner(dls, recipe, tmp)
        start = perf_counter()
        with learn.no_bar(), learn.no_logging(): learn.fit(recipe.epochs)
        seconds = perf_counter() - start
    df = pd.DataFrame(learn.recorder.values, columns=learn.recorder.metric_names[1:-1])
    images = 'held-out' if args.held_out else 'test'
    return dict(what=what, seed=seed, measure=f'accuracy on the {images} images after the last epoch', unit='%', n=1,
                values=[100*df.valid_accuracy.iloc[-1]], recipe=vars(recipe), steps=recipe.epochs*len(dls.train),
                runs_at_once=args.jobs, number_format=str(number_format(torch.device('cpu')))[6:],
                seconds=round(seconds, 1), history=curves(df), **facts())


def options():
    p = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    names = [*changes, *RECIPES]
    p.add_argument('candidates', nargs='*', metavar='CANDIDATE', help=f'any of: {", ".join(names)}; none: all but the recipes')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1], help='of weights, order and augmentation')
    p.add_argument('--held-out', type=int, default=500, help='training images that validate; 0: the test images do')
    p.add_argument('--jobs', type=int, default=1, help='runs at once')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch in each run')
    p.add_argument('--out', type=Path, default=here/'results', help='folder of the JSON lines')
    args = p.parse_args()
    if wrong := [o for o in args.candidates if o not in names]: p.error(f'no candidate {wrong[0]!r}: {", ".join(names)}')
    return args


def main():
    args, found = options(), {}
    todo = [*product(args.candidates or changes, args.seeds)]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context('spawn')) as pool:
        for o in pool.map(partial(train, args=args), todo):
            save([o], args.out)
            found.setdefault(o['what'], []).append(o['values'][0])
            print(f'{o["what"]}, seed {o["seed"]}: {o["values"][0]:.1f}% in {o["steps"]} steps, {o["seconds"]} s', flush=True)
    for what, values in found.items(): print(f'{what}: {mean(values):.2f}% as the mean of {len(values)}')


if __name__ == '__main__': main()
