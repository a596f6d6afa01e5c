"""Trains `fast` for a few epochs with one thing changed at a time: what each brings, on images held out of training.

One run for each variant from each seed that is asked for. The test images are not read.
"""
import json
import multiprocessing
import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.torch_core import set_seed

from accuracy import curves
from common import facts, here, save
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.app.teacher import TEACHER
from s9_fastai.training.distill import TeacherLogits, Distill, check_logits
from s9_fastai.training.fast import autocast_dtype
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.resume.settings import describe_callback

fields = {  # of the recipe, by what is said of a variant
    'as it is': {},
    'without averages': dict(ema=0.), 'averages three times as old': dict(ema=0.09),
    "Nesterov's momentum": dict(opt='nesterov', lr=0.15, wd=3e-4), 'momentum 0.95': dict(mom=0.95),
    'steps in place of the triangle': dict(sched='step', step_size=2), 'rise in a tenth': dict(pct_start=0.1),
    'rate 0.2': dict(lr=0.2), 'rate 0.45': dict(lr=0.45), 'batches of 64': dict(bs=64),
    'no weight decay': dict(wd=0.), 'three times the weight decay': dict(wd=3e-3),
    'label smoothing 0.1': dict(label_smoothing=0.1), 'dropout 0.05': dict(dropout=0.05),
    "the experiment's augmentation": dict(policy='reference'), 'no augmentation': dict(policy='none'),
    'flips by turns': dict(policy='alt_flip_crop'), 'cutout': dict(policy='flip_crop_cutout')}
callbacks = {'mixup 0.2': partial(MixUp, 0.2), 'cutmix': CutMix}
taught = {'a teacher, weight 0.5': partial(Distill, weight=0.5), 'a teacher, weight 0.9': Distill}


def recipe_of(what, args):
    return get_recipe('fast', **{'epochs': args.epochs, 'held_out': args.held_out, **fields.get(what, {})})


def subject(what, seed, args):
    "What tells one training from another, beside its recipe"
    teacher = dict(teacher=TeacherLogits.load(args.teacher).key) if what in taught else {}
    return dict(what=what, seed=seed, data_key=args.data_key, **teacher)


def train(what, seed, args):
    "The result of one variant, as a line"
    torch.set_num_threads(args.threads)
    facts()  # before the training: how busy the machine is
    recipe = recipe_of(what, args)
    set_seed(seed)
    dls = cifar_dls(args.data, recipe.bs, seed=seed, policy=recipe.policy, augment=recipe.augment,
                    held_out=recipe.held_out, device=torch.device('cpu'))
    cbs = [callbacks[what]()] if what in callbacks else []
    if what in taught:
        check_logits(teacher_logits := TeacherLogits.load(args.teacher), dls)
        cbs = [taught[what](teacher_logits)]
    learn = s9_learner(dls, recipe, cbs=cbs)
    start = perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(recipe.epochs)
    df = pd.DataFrame(learn.recorder.values, columns=learn.recorder.metric_names[1:-1])
    return dict(**subject(what, seed, args), measure='accuracy on the held-out images after the last epoch', unit='%', n=1,
                values=[100*df.valid_accuracy.iloc[-1]], recipe=vars(recipe),
                callbacks=[describe_callback(cb) for cb in cbs], runs_at_once=args.jobs,
                autocast_dtype=str(autocast_dtype(torch.device('cpu')))[6:],
                seconds=round(perf_counter() - start), history=curves(df), **facts())


def is_done(what, seed, args):
    "Are the results of this training there already? The oldest lines tell neither data nor teacher"
    path = args.out/'ablate.jsonl'
    lines = map(json.loads, path.read_text(encoding='utf-8').splitlines()) if path.is_file() else ()
    mine = {**subject(what, seed, args), 'recipe': vars(recipe_of(what, args))}
    return any(all(o.get(k, v) == v for k, v in mine.items()) for o in lines)


def options(names):
    p = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.add_argument('variants', nargs='*', metavar='VARIANT', help=f'one of: {", ".join(names)}; none: all')
    p.add_argument('--data', default=os.environ.get('S9_CIFAR10'), help="the full CIFAR-10, or 'sample' to try out")
    p.add_argument('--epochs', type=int, default=8, help='passes over the training images')
    p.add_argument('--seeds', type=int, nargs='+', default=[0], help='of weights, order and augmentation')
    p.add_argument('--held-out', type=int, default=5000, help='training images that validate')
    p.add_argument('--teacher', type=Path, default=TEACHER, help="logits from teacher.py; if not given, the package's")
    p.add_argument('--jobs', type=int, default=1, help='runs at once')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch in each run')
    p.add_argument('--out', type=Path, default=here/'results', help='folder of the JSON lines')
    args = p.parse_args()
    if wrong := [o for o in args.variants if o not in names]: p.error(f'no variant {wrong[0]!r}: {", ".join(names)}')
    args.data_key = load_cifar(args.data).key
    return args


def main():
    names = [*fields, *callbacks, *taught]
    args = options(names)
    todo = [(o, s) for s in args.seeds for o in args.variants or names if not is_done(o, s, args)]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context('spawn')) as pool:
        for o in pool.map(partial(train, args=args), *zip(*todo)):
            save([o], args.out)
            print(f'{o["what"]}, seed {o["seed"]}: {o["values"][0]:.2f}%', flush=True)


if __name__ == '__main__': main()
