"""Trains the recipe `sample` with one thing changed at a time on the 2,000 embedded images; a row for each run.

Held-out images of these compare the variants. With `--held-out 0` the 500 test images validate: for the recipe as it is only.
"""
import multiprocessing
import sys
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import chosen, cpu_dtype, curves, facts, jobs_option, options, parse, save, seeds_option, variants_argument
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe

changes = {  # fields of the recipe, by the name of a variant; other batch sizes come with epochs that take as long
    'as it is': {}, 'rate, weight decay and averages of fast': dict(lr=0.3, wd=1e-3, ema=0.03),
    '40 epochs': dict(epochs=40), 'batches of 128': dict(bs=128, epochs=36, lr=0.6),
    'batches of 32': dict(bs=32, epochs=20, lr=0.3), 'batches of 256': dict(bs=256, epochs=44, lr=0.9),
    'rate 0.2': dict(lr=0.2), 'rate 0.8': dict(lr=0.8),
    'momentum 0.8': dict(mom=0.8), 'rise in two fifths': dict(pct_start=0.4), 'label smoothing 0.1': dict(label_smoothing=0.1),
    'dropout 0.05': dict(dropout=0.05), 'a tenth of the weight decay': dict(wd=1e-3), 'without averages': dict(ema=0.),
    'averages a third as old': dict(ema=0.03), 'flips by turns': dict(policy='alt_flip_crop'),
    'cutout': dict(policy='flip_crop_cutout'), 'no augmentation': dict(policy='none')}


def train(todo, args):
    "The result of one variant from one seed, as a line"
    what, seed = todo
    torch.set_num_threads(args.threads)
    facts()  # before the training: how busy the machine is
    changed = {**changes[what], 'held_out': args.held_out}
    if args.epochs: changed['epochs'] = args.epochs
    recipe = get_recipe('sample', **changed)
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
                runs_at_once=args.jobs, autocast_dtype=cpu_dtype(),
                seconds=round(seconds, 1), history=curves(df), **facts())


def arguments():
    p = options(__doc__)
    variants_argument(p, changes)
    seeds_option(p, [0, 1])
    jobs_option(p)
    p.add_argument('--held-out', type=int, default=500, help='training images that validate; 0: the test images validate')
    p.add_argument('--epochs', type=int, help='passes over the training images; not given: those of the variant')
    args = parse(p)
    args.variants = chosen(p, args.variants, changes)
    return args


def main():
    args, found = arguments(), {}
    todo = [*product(args.variants, args.seeds)]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context('spawn')) as pool:
        for o in pool.map(partial(train, args=args), todo):
            save([o], args.out)
            found.setdefault(o['what'], []).append(o['values'][0])
            print(f'{o["what"]}, seed {o["seed"]}: {o["values"][0]:.1f}% after {o["steps"]} steps, {o["seconds"]} s', flush=True)
    for what, values in found.items(): print(f'{what}: {mean(values):.2f}% as the mean of {len(values)}')


if __name__ == '__main__': main()
