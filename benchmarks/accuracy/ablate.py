"""Trains `fast` for a few epochs with one thing changed at a time, and measures each on held-out training images.

One run for each variant and seed. The test images are not read.
"""
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.torch_core import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import chosen, cpu_dtype, curves, data_option, facts, jobs_option, options, parse, read_lines, save, seeds_option, variants_argument
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.app.teacher import TEACHER
from s9_fastai.training.distill import TeacherLogits, Distill, check_logits
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.resume.settings import describe_callback

fields = {  # of the recipe, by the name of a variant
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
    "What identifies a training, beside its recipe"
    teacher = dict(teacher=TeacherLogits.load(args.teacher).key) if what in taught else {}
    return dict(what=what, seed=seed, data_key=args.data_key, **teacher)


def train(what, seed, args):
    "The result of one variant, as a row"
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
                autocast_dtype=cpu_dtype(),
                seconds=round(perf_counter() - start), history=curves(df), **facts())


def is_done(what, seed, args):
    "Does this training have a row already? The oldest rows have neither data nor teacher"
    mine = {**subject(what, seed, args), 'recipe': vars(recipe_of(what, args))}
    return any(all(o.get(k, v) == v for k, v in mine.items()) for o in read_lines(args.out/'ablate.jsonl'))


def arguments():
    p, names = options(__doc__), [*fields, *callbacks, *taught]
    variants_argument(p, names)
    data_option(p)
    seeds_option(p, [0])
    jobs_option(p)
    p.add_argument('--epochs', type=int, default=8, help='passes over the training images')
    p.add_argument('--held-out', type=int, default=5000, help='training images that validate')
    p.add_argument('--teacher', type=Path, default=TEACHER, help="logits from teacher.py; default: the packaged ones")
    args = parse(p)
    args.variants = chosen(p, args.variants, names)
    args.data_key = load_cifar(args.data).key
    return args


def main():
    args = arguments()
    todo = [(o, s) for s in args.seeds for o in args.variants if not is_done(o, s, args)]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context('spawn')) as pool:
        for o in pool.map(partial(train, args=args), *zip(*todo)):
            save([o], args.out)
            print(f'{o["what"]}, seed {o["seed"]}: {o["values"][0]:.2f}%', flush=True)


if __name__ == '__main__': main()
