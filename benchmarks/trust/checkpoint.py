"What checkpoints cost: the part of an epoch's time that is spent in `Checkpoint` and `FiniteLoss`, in early epochs and in the hundredth"
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from fastcore.basics import noop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_line, method_options, options, parse, save, show
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.training.guards import FiniteLoss
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe

spent = []  # seconds in the two callbacks, one sum an epoch


def timed(cls):
    "A subclass of `cls` that adds the time of each of its events to `spent`"
    class Timed(cls):
        name = cls(**({'run_dir': '.'} if cls is Checkpoint else {})).name
        def __call__(self, event):
            start = time.perf_counter()
            super().__call__(event)
            if spent: spent[-1] += time.perf_counter() - start
    return Timed


class Epochs(Callback):
    "Times each epoch, and before the last ones makes the Recorder's lists as long as they are after 100 epochs"
    order = -2000  # before all others
    def __init__(self, repeats): self.repeats, self.starts = repeats, []
    def before_epoch(self):
        if self.epoch == 1 + self.repeats: self.lengthen(100*len(self.dls.train))
        self.starts.append(time.perf_counter())
        spent.append(0.)
    def after_fit(self): self.starts.append(time.perf_counter())
    def lengthen(self, n):
        rec, step = self.recorder, self.learn.step_lr
        rec.lrs, step.hps['lr'] = [0.05]*n, [0.05]*n
        rec.losses = [torch.tensor(i/n) for i in range(n)]


def run(data, repeats, augment, run_dir):
    "Epochs: a warm-up, `repeats` early ones, `repeats` as the hundredth; seconds of each, and those in the callbacks"
    set_seed(0)
    dls, clock = cifar_dls(data, augment=augment, seed=0), Epochs(repeats)
    learn = s9_learner(dls, get_recipe(augment=augment), cbs=[clock, timed(FiniteLoss)(), timed(Checkpoint)(run_dir)])
    learn.remove_cbs([cb for cb in learn.cbs if type(cb) in (FiniteLoss, ProgressCallback)])
    learn.logger = noop
    learn.fit(1 + 2*repeats)
    return [b - a for a, b in zip(clock.starts, clock.starts[1:])][1:], spent[1:]


def main():
    p = options(__doc__, repeats=3)
    method_options(p, ['batch', 'item'])
    args = parse(p)
    lines = []
    for augment in args.methods:
        spent.clear()
        with TemporaryDirectory() as tmp: epochs, inside = run(args.data, args.repeats, augment, tmp)
        for name, part in (('early', slice(args.repeats)), ('the hundredth', slice(args.repeats, None))):
            o = dict(augment=augment, seconds_of_the_epochs=epochs[part], seconds_inside=inside[part])
            percent = [100*b/a for a, b in zip(epochs[part], inside[part])]
            lines.append(make_line(f'{augment} path, {name} epoch', 'part of an epoch', '%', percent, o))
    save(lines, args.out)
    show(lines, lines[0]['what'])


if __name__ == '__main__': main()
