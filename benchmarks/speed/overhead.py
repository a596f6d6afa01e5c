"Milliseconds that fastai adds to each batch, part by part, on a stand-in for the Net that computes almost nothing"
import os
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import CastToTensor, Learner
from fastai.callback.core import TrainEvalCallback
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_line, options, parse, save, show
from methods import bare_sgd, fixed_batch
from s9_fastai.training.fast import FastSGD
from s9_fastai.nets.net import Net
from s9_fastai.training.record import EpochRecorder
from s9_fastai.training.schedule import StepLR


class StandIn(nn.Module):
    "The parameters of the Net, each of which gets a gradient"
    def __init__(self):
        super().__init__()
        self.params = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in Net().parameters())

    def forward(self, x): return x[:, :1, 0, :10].flatten(1)*torch.stack([p.flatten()[0] for p in self.params]).sum()


class Still:
    "A loader that returns one batch `n` times"
    def __init__(self, batch, n): self.batch, self.n, self.device = batch, n, torch.device('cpu')
    def __len__(self): return self.n
    def __iter__(self): return iter([self.batch]*self.n)


def loop(batch, steps):
    "PyTorch's own loop"
    model, (xb, yb) = StandIn(), batch
    opt = bare_sgd(model)

    def run():
        for _ in range(steps):
            F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
    return run


def fit(batch, steps, opt, cbs, metrics=None):
    "A Learner with nothing but `cbs`"
    dls = DataLoaders(Still(batch, steps), Still(batch, 1))
    learn = Learner(dls, StandIn(), CrossEntropyLossFlat(), partial(opt, mom=0.9), lr=1e-4, metrics=metrics,
                    default_cbs=False, cbs=[TrainEvalCallback(), CastToTensor(), *(cb() for cb in cbs)])
    learn.logger = lambda row: None

    def run():
        with open(os.devnull, 'w') as f, redirect_stdout(f): learn.fit(1)
    return run


FAST = dict(opt=FastSGD, metrics=accuracy)
WAYS = {'PyTorch loop': loop,
        'Learner, FastSGD, nothing recorded': partial(fit, opt=FastSGD, cbs=[]),
        "Learner, fastai's SGD, nothing recorded": partial(fit, opt=SGD, cbs=[]),
        'FastSGD, table of loss and accuracy': partial(fit, cbs=[EpochRecorder], **FAST),
        'FastSGD, table, StepLR': partial(fit, cbs=[EpochRecorder, StepLR], **FAST),
        'FastSGD, table, StepLR, progress bar': partial(fit, cbs=[EpochRecorder, StepLR, ProgressCallback], **FAST)}


def main():
    p = options(__doc__, repeats=5)
    p.add_argument('--steps', type=int, default=200, help='batches in a repetition')
    args = parse(p)
    batch, times = fixed_batch(128), {}
    runs = {nm: make(batch, args.steps) for nm, make in WAYS.items()}
    for rep in range(args.repeats + 1):
        for nm, run in runs.items():
            start = perf_counter()
            run()
            if rep: times.setdefault(nm, []).append(1e3*(perf_counter() - start)/args.steps)
        print(f'round {rep}' if rep else 'warm-up', file=sys.stderr, flush=True)
    lines = [make_line(nm, 'one batch', 'ms', ms, dict(steps=args.steps)) for nm, ms in times.items()]
    save(lines, args.out)
    show(lines, 'PyTorch loop')


if __name__ == '__main__': main()
