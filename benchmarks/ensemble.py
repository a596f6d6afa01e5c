"""Makes one teacher of several runs: the mean of what their networks say of each training image, for `s9_train --teacher`.

The runs must have been trained on the same images, with the same ones held out, by which the teacher is judged.
"""
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import numpy as np
import torch
from torch import nn

from accuracy import told
from common import facts, here, save
from s9_fastai.cifar import load_cifar
from s9_fastai.data import hold_out
from s9_fastai.distill import ask
from s9_fastai.run import kept_source, read_run, run_net


class Ensemble(nn.Module):
    "Several networks asked for the same images: the mean of their logits"
    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x): return sum(net(x) for net in self.nets)/len(self.nets)


def the_same(runs, values, what):
    "The one value that all `runs` have"
    if len({*values}) > 1: sys.exit(f'{", ".join(map(str, runs))} have different {what}: {", ".join(map(str, values))}')
    return values[0]


def right(answers, labels, held_out):
    "In %, how often the answers are right: about the images that were held out, and about the others"
    hit = answers.logits.argmax(1).numpy() == labels
    out = np.isin(np.arange(len(labels)), hold_out(labels, held_out))
    return 100*float(hit[out].mean()), 100*float(hit[~out].mean())


def options():
    p = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument('runs', type=Path, nargs='+', metavar='RUN', help='folder of a run that was trained with --held-out')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch')
    p.add_argument('--keep', type=Path, default=here.parent/'runs'/'ensemble.safetensors', help='file of its answers')
    p.add_argument('--out', type=Path, default=here/'results', help='folder of the JSON lines')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    return args


def main():
    args = options()
    recipes, abouts = zip(*map(read_run, args.runs))
    held_out = the_same(args.runs, [o.held_out for o in recipes], 'numbers of held-out images')
    if not held_out: sys.exit('the runs have no held-out images, but a teacher must be judged: train them with --held-out 5000')
    data = load_cifar(the_same(args.runs, [kept_source(*o) for o in zip(args.runs, abouts)], 'data'))
    answers = ask(Ensemble(map(run_net, args.runs)), data.train.images, data_key=data.key, held_out=str(held_out))
    args.keep.parent.mkdir(parents=True, exist_ok=True)
    answers.save(args.keep)
    unseen, seen = right(answers, data.train.labels, held_out)
    save([dict(what='ensemble', measure='accuracy of the answers on the held-out images', unit='%', n=1, values=[unseen],
               trained_on=seen, key=answers.key, members=[told(o) for o in args.runs], **facts())], args.out)
    print(f'right about {unseen:.2f}% of the held-out images, {seen:.2f}% of the others; its answers are in {args.keep}')


if __name__ == '__main__': main()
