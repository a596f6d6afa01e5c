"""Trains a larger network as a teacher, and saves its logits for the training images, for `s9_train --teacher`.

The network has the shape of the one in airbench94 (Jordan, 2024), built of fastai's layers: convolutions without groups
and dilation, which a CPU computes at a higher rate than the Net's. It is not trained on the held-out images.
"""
import sys
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.layers import ConvLayer
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import curves, data_option, facts, options, parse, root, save
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.data.loader import hold_out
from s9_fastai.app.teacher import predict_logits
from s9_fastai.training.fast import keep_freed_memory
from s9_fastai.training.layers import fast_layers
from s9_fastai.app.recipe import get_recipe
from s9_fastai.training.record import EpochRecorder


def group(ni, nf):
    return [nn.Conv2d(ni, nf, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(nf), nn.ReLU(),
            ConvLayer(nf, nf)]


def network(width=64):
    "(B, 3, 32, 32) to logits (B, 10); `width` channels, and four times as many in the later groups"
    return nn.Sequential(
        ConvLayer(3, 24, ks=2, padding=0),                # (B, 24, 31, 31)
        *group(24, width), *group(width, 4*width),        # (B, 4*width, 7, 7)
        *group(4*width, 4*width), nn.MaxPool2d(3),        # (B, 4*width, 1, 1)
        nn.Flatten(), nn.Linear(4*width, 10))             # (B, 10)


def make_learner(args):
    recipe = get_recipe('fast', epochs=args.epochs, bs=256, held_out=args.held_out)
    set_seed(args.seed)
    dls = cifar_dls(args.data, recipe.bs, seed=args.seed, policy=recipe.policy, augment=recipe.augment,
                    held_out=recipe.held_out, device=torch.device('cpu'))
    cbs = [ChannelsLast, *recipe.scheduler(), *recipe.ema_cbs()]
    learn = Learner(dls, fast_layers(network(args.width)), loss_func=recipe.loss_func(), opt_func=recipe.opt_func(),
                    lr=recipe.lr, wd=recipe.wd, metrics=accuracy)
    keep_freed_memory()
    learn.remove_cb(learn.recorder)
    learn.recipe = recipe
    return learn.add_cbs([EpochRecorder(), *cbs])


def right(teacher_logits, labels, held_out):
    "For how many of the held-out images the largest logit is right"
    at = hold_out(labels, held_out)
    return int((teacher_logits.logits[at].argmax(1).numpy() == labels[at]).sum())


def line(learn, args, seconds, n_right):
    "The result, with every epoch"
    df = pd.DataFrame(learn.recorder.values, columns=learn.recorder.metric_names[1:-1])
    n_params = sum(p.numel() for p in learn.model.parameters())
    recipe = {k: v for k, v in vars(learn.recipe).items() if k not in ('n_channels', 'norm', 'dropout', 'compute')}
    return dict(what='teacher', measure='accuracy on the held-out images after the last epoch', unit='%', n=1,
                values=[100*df.valid_accuracy.iloc[-1]], seed=args.seed, parameters=n_params, width=args.width,
                answers_right=n_right, recipe=recipe, seconds=round(seconds), history=curves(df), **facts())


def arguments():
    p = options(__doc__)
    data_option(p)
    p.add_argument('--epochs', type=int, default=14, help='passes over the training images')
    p.add_argument('--width', type=int, default=64, help='channels of the first group')
    p.add_argument('--held-out', type=int, default=5000, help='training images that validate')
    p.add_argument('--seed', type=int, default=0, help='of weights, order and augmentation')
    p.add_argument('--keep', type=Path, default=root/'runs'/'teacher.safetensors', help='file of its logits')
    args = parse(p)
    if args.held_out < 1: p.error(f'--held-out is {args.held_out}, but a teacher must be validated: give at least 10')
    return args


def main():
    args = arguments()
    facts()  # before the training: how busy the machine is, and which commit this is
    args.keep.parent.mkdir(parents=True, exist_ok=True)
    learn, start = make_learner(args), perf_counter()
    learn.fit(args.epochs)
    about = dict(data_key=learn.dls.source.key, held_out=str(args.held_out))
    train = load_cifar(args.data).train
    teacher_logits = predict_logits(learn.model, train.images, **about)
    teacher_logits.save(args.keep)
    o = line(learn, args, perf_counter() - start, right(teacher_logits, train.labels, args.held_out))
    save([o], args.out)
    print(f'{o["parameters"]:,} parameters: {o["values"][0]:.2f}% of the held-out images; its logits are in {args.keep}')


if __name__ == '__main__': main()
