"""Fits of random combinations of models, callbacks, transforms, loaders, optimizers and schedules, each stopped at three moments and resumed with
new objects: equal to the bit, or refused with a message before the first batch. An exception raised in the fit stands for a kill; the last `--killed`
combinations run in a process of their own, which ends with SIGKILL. The data is made up: 20 images of 16 pixels, 48 rows of a table, 20 sentences"""
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict, deque
from decimal import Decimal
from enum import Enum
from functools import partial
from pathlib import Path

import albumentations as A
import numpy as np
import pandas as pd
import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IndexSplitter, IntToFloatTensor, Normalize, ToTensor, range_of
from fastai.callback.data import WeightedDL
from fastai.layers import ConvLayer, ResBlock
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, Lamb, OptimWrapper, QHAdam, RAdam, RMSProp, SGD, ranger
from fastai.tabular.all import Categorify, FillMissing, TabularPandas, tabular_learner
from fastai.text.all import AWD_LSTM, TextBlock, awd_lstm_clas_config, text_classifier_learner
from fastai.torch_core import set_seed
from fastai.vision.augment import FlipItem, RandomErasing, RandomResizedCrop, aug_transforms
from fastai.vision.core import PILImage, imagenet_stats
from fastai.vision.data import ImageBlock
from fastai.callback.core import Callback
from fastcore.foundation import L
from fasttransform import ItemTransform, Pipeline, Transform
from PIL import Image
from torch import nn
from torch.utils.data import RandomSampler, WeightedRandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import facts, options, parse, save
from s9_fastai.augment.batch import BatchAugment
from s9_fastai.augment.item import AlbumentationsTransform, AlternatingFlip
from s9_fastai.augment.keyed import KeyedDL, keyed_class, make_keyed
from s9_fastai.augment.policies import get_policy
from s9_fastai.core.events import in_fit
from s9_fastai.core.signals import Stopped
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.resume.saved import ResumeError
from s9_fastai.resume.state import encode
from s9_fastai.training.ema import EMA
from s9_fastai.training.guards import FiniteLoss, NoNormDecay
from s9_fastai.training.muon import FastMuon
from s9_fastai.training.schedule import TriangularLR
from s9_fastai.test_utils import quiet

n_train, n_valid, n_classes, epochs = 20, 6, 4, 2
classes = [f'class {i}' for i in range(n_classes)]
words = [f'word{i}' for i in range(30)]


def a_seed(): return random.getrandbits(31)  # another one in each Learner: what is not restored is seen


def push(learn, by):
    "Moves the weights by a number, so that a state that differs is seen"
    with torch.no_grad(): next(learn.model.parameters()).add_(1e-4*float(by))


# ---- callbacks

class Drawing(Callback):
    "Moves the weights by what `draw` makes of the attribute `state`"
    def __init__(self, new, draw): self.state, self.draw = new(), draw
    def after_step(self): push(self.learn, self.draw(self))


def changed(change, number=float):
    "`change` gets the state and gives the next one; `number` makes a number of it"
    def draw(self):
        self.state = change(self.state)
        return number(self.state)
    return draw


def filled(change, number=len):
    "`change` fills the state in place"
    def draw(self):
        change(self.state)
        return number(self.state)
    return draw


class Phase(Enum): FIRST, SECOND, THIRD = 1, 2, 3


def next_phase(o): return Phase(o.value % 3 + 1)
def count_nested(o): o['a']['b'] += 1


#: What a callback can hold: a new value, and a draw from it
STATES = {
    'random.Random': (lambda: random.Random(a_seed()), lambda o: o.state.random()),
    'numpy Generator': (lambda: np.random.default_rng(a_seed()), lambda o: o.state.normal()),
    'torch.Generator': (lambda: torch.Generator().manual_seed(a_seed()), lambda o: torch.rand(1, generator=o.state)),
    'generators in a dict': (lambda: dict(a=[random.Random(a_seed())], b=np.random.RandomState(a_seed())), lambda o: o.state['a'][0].random() + o.state['b'].rand()),
    'deque': (lambda: deque(maxlen=5), filled(lambda o: o.append(len(o) + 1), lambda o: sum(o))), 'set': (set, filled(lambda o: o.add(len(o)))),
    'text': (str, changed(lambda o: o + 'x', len)), 'bytes': (bytes, changed(lambda o: o + b'x', len)), 'complex': (complex, changed(lambda o: o + 1j, abs)),
    'Decimal': (Decimal, changed(lambda o: o + Decimal('0.1'))), 'count': (itertools.count, lambda o: next(o.state)), 'numpy float32': (lambda: np.float32(1), changed(lambda o: o*np.float32(1.01))),
    'Enum': (lambda: Phase.FIRST, changed(next_phase, lambda o: o.value)), 'nested defaultdict': (lambda: defaultdict(Counter), filled(count_nested, lambda o: o['a']['b'])),
    'DataFrame': (lambda: pd.DataFrame(dict(a=[0.])), filled(lambda o: o.__setitem__('a', o['a'] + 1), lambda o: o['a'].sum())), 'PIL image': (lambda: Image.new('L', (2, 2)), filled(lambda o: o.putpixel((0, 0), o.getpixel((0, 0)) + 1), lambda o: o.getpixel((0, 0)))),
    'generator of Python': (lambda: (i for i in itertools.count()), lambda o: next(o.state)), 'iterator': (lambda: iter(range(10**4)), lambda o: next(o.state))}


class Declared(Drawing):
    "Has a state that no result depends on"
    not_saved = ('state',)
    def __init__(self): super().__init__(object, None)
    def after_step(self): self.state = object()


class ByItself(Callback):
    "Decides what is saved"
    def __init__(self): self.left = iter(range(1000))
    def after_step(self): push(self.learn, next(self.left))
    def state_dict(self):
        self.left, copy = itertools.tee(self.left)
        return dict(left=next(copy))
    def load_state_dict(self, state): self.left = iter(range(state['left'], 1000))


class Freezing(Callback):
    "Trains the head alone in the first epoch"
    def before_epoch(self): self.learn.freeze() if self.epoch == 0 else self.learn.unfreeze()


class Curious(Callback):
    "Validates in the middle of the training"
    def after_epoch(self):
        if self.epoch == 1: self.learn.validate()


class Hooked(Callback):
    "Registers a hook in the second epoch"
    def before_epoch(self):
        if self.epoch == 1: next(self.model.children()).register_forward_hook(lambda m, i, o: o*0.9)


class OnLearner(Callback):
    "Writes where every callback can read"
    def before_fit(self): self.learn.n_seen = 0
    def after_step(self):
        self.learn.n_seen += 1
        push(self.learn, self.learn.n_seen)


def plateau(): return ReduceLROnPlateau('valid_loss', patience=0, factor=2, min_delta=0.5)


CALLBACKS = {
    'MixUp': MixUp, 'CutMix': CutMix, 'EMA': EMA, 'GradientAccumulation': lambda: GradientAccumulation(10), 'SaveModel': lambda: SaveModelCallback(), 'SaveModel every epoch': lambda: SaveModelCallback(every_epoch=True, with_opt=True),
    'ReduceLROnPlateau': plateau, 'EarlyStopping': lambda: EarlyStoppingCallback('valid_loss', patience=1, min_delta=0.01), 'CSVLogger': CSVLogger, 'GradientClip': lambda: GradientClip(0.5), 'BnFreeze': BnFreeze,
    'FiniteLoss': FiniteLoss, 'NoNormDecay': NoNormDecay, 'state_dict': ByItself, 'not_saved': Declared, 'freeze and unfreeze': Freezing, 'validate in a fit': Curious, 'hook': Hooked, 'attribute of the Learner': OnLearner,
    **{f'state: {k}': partial(Drawing, *v) for k, v in STATES.items()}}
OF_IMAGES = {'MixUp', 'CutMix'}


# ---- data, transforms, loaders

def image(i): return PILImage.create(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8))
def label(i): return classes[i % n_classes]
def sentence(i): return ' '.join(words[(i*7 + j*j) % 30] for j in range(5 + i % 9))
def split_words(s): return L(s.split())


class ThreeGlobals(ItemTransform):
    "Draws from the global generators of random, numpy and torch"
    split_idx, order = 0, 1
    def encodes(self, x):
        im = np.roll(np.asarray(x[0]), (int(16*random.random()), int(16*np.random.rand())), (0, 1))
        return (PILImage.create(255 - im if torch.rand(()) < 0.5 else im), *x[1:])


class OwnState(ItemTransform):
    "Draws from generators of its own, and counts"
    split_idx, order = 0, 1
    def __init__(self):
        super().__init__()
        self.rng, self.n, self.seen, self.text = np.random.default_rng(a_seed()), 0, deque(maxlen=3), ''
    def encodes(self, x):
        self.n, self.text = self.n + 1, self.text + 'x'
        self.seen.append(self.n)
        return (PILImage.create(np.roll(np.asarray(x[0]), int(self.rng.integers(16)) + sum(self.seen) + len(self.text), 0)), *x[1:])


class LastImage(ItemTransform):
    "Blends an image with the one before"
    split_idx, order, last = 0, 1, None
    def encodes(self, x):
        im = Image.blend(x[0], self.last, 0.3) if self.last else x[0]
        self.last = x[0]
        return (PILImage.create(im), *x[1:])


class Noise(Transform):
    "Of a whole batch, from a generator of its own"
    split_idx, order = 0, 20
    def __init__(self): self.g = torch.Generator().manual_seed(a_seed())
    def encodes(self, x:torch.Tensor): return x + torch.randn(x.shape, generator=self.g)*0.1 if x.is_floating_point() else x


def counting():
    "A function that counts its calls in its default"
    def brighten(x, n=[0]):  # noqa: B006 (that is the case)
        n[0] += 1
        return x*(1 + n[0]/1000) if x.is_floating_point() else x
    return brighten


def flips(): return AlbumentationsTransform(A.Compose([AlternatingFlip(p=0.5), A.RandomCrop(14, 14), A.PadIfNeeded(16, 16), A.CoarseDropout(p=0.5)]))


ITEM_TFMS = {'none': list, 'three globals': lambda: [ThreeGlobals()], 'own state': lambda: [OwnState()], 'last image': lambda: [LastImage()], 'Albumentations': lambda: [flips()],
             "fastai's": lambda: [RandomResizedCrop(16), FlipItem()], 'Compose': lambda: [flips(), ThreeGlobals(), AlbumentationsTransform(A.Compose([A.ColorJitter(p=0.5), A.GaussNoise(p=0.5)]))]}
BATCH_TFMS = {'none': list, 'aug_transforms': lambda: aug_transforms(size=16, max_warp=0), 'BatchAugment': lambda: [BatchAugment.from_compose(get_policy('flip_crop', 16, [0.5]*3))], 'noise': lambda: [Noise()], 'counting function': lambda: [counting()],
              'RandomErasing': lambda: [RandomErasing(p=0.5), Normalize.from_stats(*imagenet_stats, cuda=False)]}


class Turns:
    "A sampler that begins elsewhere in each epoch"
    def __init__(self): self.begin = 0
    def __len__(self): return n_train
    def __iter__(self):
        self.begin += 5
        return iter([(i + self.begin) % n_train for i in range(n_train)])


class Read(torch.utils.data.Dataset):
    "Items as torch's loader reads them"
    def __init__(self, dset, tfms): self.dset, self.tfms = dset, tfms
    def __len__(self): return len(self.dset)
    def __getitem__(self, i): return self.tfms(self.dset[i])


def gen(): return torch.Generator().manual_seed(a_seed())


TORCHS = {'torch, shuffle': lambda ds: dict(shuffle=True), 'torch, generator': lambda ds: dict(shuffle=True, generator=gen()), 'torch, RandomSampler': lambda ds: dict(sampler=RandomSampler(ds, generator=gen())), 'torch, own sampler': lambda ds: dict(sampler=Turns()),
          'torch, weights': lambda ds: dict(sampler=WeightedRandomSampler(torch.arange(1., n_train + 1), n_train, generator=gen())), 'torch, persistent': lambda ds: dict(shuffle=True, persistent_workers=True)}
FASTAIS = {'TfmdDL': TfmdDL, 'KeyedDL': KeyedDL, 'WeightedDL': WeightedDL, 'keyed WeightedDL': keyed_class(WeightedDL)}
LOADERS = {**dict.fromkeys(FASTAIS, 3), **dict.fromkeys(TORCHS, 1)}  # how often


def torch_dls(dsets, item, batch, spec):
    "Loaders of torch; a batch transform runs in `collate_fn`, so in a worker where there is one"
    tfms = Pipeline([*item, ToTensor()], split_idx=0), Pipeline([ToTensor()], split_idx=1)
    after = Pipeline([IntToFloatTensor(), *batch], split_idx=0), Pipeline([IntToFloatTensor()], split_idx=1)
    dls = []
    for i, ds in enumerate(map(Read, (dsets.train, dsets.valid), tfms)):
        collate = partial(lambda after, b: after(tuple(torch.utils.data.default_collate(b))), after[i])
        more = TORCHS[spec['loader']](ds) if i == 0 else {}
        dls.append(torch.utils.data.DataLoader(ds, spec['bs'], num_workers=spec['workers'], collate_fn=collate, **more))
    return DataLoaders(*dls, device='cpu')


def image_dls(spec):
    block = DataBlock((ImageBlock, CategoryBlock(vocab=classes)), getters=[image, label], splitter=IndexSplitter(range(n_train, n_train + n_valid)))
    dsets, item, batch = block.datasets(range(n_train + n_valid)), ITEM_TFMS[spec['item']](), BATCH_TFMS[spec['batch']]()
    if spec['loader'] in TORCHS: return torch_dls(dsets, item, batch, spec)
    cls = FASTAIS[spec['loader']]
    shared = dict(bs=spec['bs'], num_workers=spec['workers'], device='cpu', after_item=[*item, ToTensor()], after_batch=[IntToFloatTensor(), *batch])
    wgts = dict(wgts=np.arange(1., n_train + 1)) if issubclass(cls, WeightedDL) else {}
    valid = KeyedDL if issubclass(cls, KeyedDL) else TfmdDL
    return DataLoaders(cls(dsets.train, shuffle=spec['shuffle'], drop_last=spec['drop_last'], **wgts, **shared), valid(dsets.valid, **shared), device='cpu')


# ---- models, losses, optimizers, schedules

class Counting(nn.Module):
    "Counts its batches in an attribute, in a buffer that is in no state_dict, and in an extra state"
    def __init__(self):
        super().__init__()
        self.net, self.n, self.extra = cnn(), 0, {}
        self.register_buffer('mean', torch.zeros(1), persistent=False)
    def forward(self, x):
        if self.training:
            self.n, self.extra = self.n + 1, dict(n=self.n)
            self.mean.lerp_(x.detach().as_subclass(torch.Tensor).mean()[None], 0.5)
        return self.net(x)*(1 + (self.n + self.extra.get('n', 0))/100) + self.mean
    def get_extra_state(self): return self.extra
    def set_extra_state(self, state): self.extra = state


def cnn(): return nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 12, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, n_classes))
def resnet(): return nn.Sequential(ConvLayer(3, 8, stride=2), ResBlock(1, 8, 8), ResBlock(1, 8, 16, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n_classes))
def spectral(): return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, 2)), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_classes))


IMAGE_MODELS = dict(cnn=cnn, resnet=resnet, counting=Counting, spectral_norm=spectral)
MODELS = {**dict.fromkeys(IMAGE_MODELS, 2), 'tabular': 1, 'text': 1}  # how often


def splitter(m):
    "Two groups of parameters"
    children = [c for c in m.children() if [*c.parameters()]]
    return L(m.parameters()).map(lambda p: [p]) if len(children) < 2 else L([*itertools.chain(*(c.parameters() for c in children[:-1]))], [*children[-1].parameters()])


class Growing(CrossEntropyLossFlat):
    "Counts its calls"
    def __init__(self):
        super().__init__()
        self.n = 0
    def __call__(self, *args, **kwargs):
        self.n += 1
        return super().__call__(*args, **kwargs)*(1 + self.n/100)


LOSSES = {'cross entropy': CrossEntropyLossFlat, 'class weights': lambda: CrossEntropyLossFlat(weight=torch.linspace(1, 2, n_classes)), 'label smoothing': LabelSmoothingCrossEntropyFlat, 'focal': FocalLossFlat, 'with a counter': Growing}
OPTS = {'SGD': partial(SGD, mom=0.9), 'Adam': Adam, 'Lamb': Lamb, 'RMSProp': partial(RMSProp, mom=0.9), 'RAdam': RAdam, 'QHAdam': QHAdam, 'ranger': ranger, 'AdamW': partial(OptimWrapper, opt=partial(torch.optim.AdamW, betas=(0.9, 0.98))),
        "torch's SGD": partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9)), 'FastMuon': FastMuon}
SCHEDULES = {'fit': lambda learn: learn.fit(epochs), 'fit_one_cycle': lambda learn: learn.fit_one_cycle(epochs, 0.01), 'fit_flat_cos': lambda learn: learn.fit_flat_cos(epochs, 0.01), 'fit_sgdr': lambda learn: learn.fit_sgdr(1, 2, 0.01),
             'StepLR': lambda learn: learn.fit_step(epochs, 0.01, step_size=1), 'TriangularLR': lambda learn: learn.fit(epochs, cbs=TriangularLR()), 'fine_tune': lambda learn: learn.fine_tune(1, 0.01), 'two fits': lambda learn: (learn.fit(1), learn.fit_one_cycle(1, 0.01))}


def tabular(spec, **kwargs):
    rng, n = np.random.default_rng(0), 48
    df = pd.DataFrame(dict(colour=rng.choice(['red', 'blue'], n), size=rng.normal(size=n), y=[classes[i % n_classes] for i in range(n)]))
    to = TabularPandas(df, [Categorify, FillMissing], ['colour'], ['size'], 'y', y_block=CategoryBlock(), splits=IndexSplitter(range(36, n))(range_of(df)))
    dls = to.dataloaders(bs=6, device='cpu')
    if spec['loader'] == 'KeyedDL': [make_keyed(dl) for dl in dls.loaders]
    return tabular_learner(dls, layers=[16, 8], config=dict(ps=0.2, embed_p=0.1), **kwargs)


def text(spec, **kwargs):
    block = DataBlock((TextBlock(split_words, vocab=words, seq_len=8), CategoryBlock(vocab=classes)), getters=[sentence, label], splitter=IndexSplitter(range(n_train, n_train + n_valid)))
    dls = block.dataloaders(range(n_train + n_valid), bs=4, num_workers=0, device='cpu')
    if spec['loader'] == 'KeyedDL': [make_keyed(dl) for dl in dls.loaders]
    return text_classifier_learner(dls, AWD_LSTM, seq_len=8, config={**awd_lstm_clas_config, 'emb_sz': 12, 'n_hid': 16, 'n_layers': 2}, pretrained=False, **kwargs)


# ---- a configuration

def draw(rng):
    "A random configuration, as text and numbers"
    def one(of): return rng.choices([*of], [*of.values()] if all(isinstance(v, int) for v in of.values()) else None)[0]
    spec = dict(model=one(MODELS), loss=one(LOSSES), opt=one(OPTS), schedule=one(SCHEDULES))
    is_image = spec['model'] in IMAGE_MODELS
    names = [k for k in CALLBACKS if is_image or k not in OF_IMAGES]
    spec['callbacks'] = rng.sample(names, rng.choice((0, 1, 1, 2, 3, 4)))
    if {*OF_IMAGES} <= {*spec['callbacks']} or spec['loss'] == 'focal' and OF_IMAGES & {*spec['callbacks']}: spec['callbacks'] = [k for k in spec['callbacks'] if k not in OF_IMAGES]
    if 'CSVLogger' in spec['callbacks']: spec['callbacks'] = [k for k in spec['callbacks'] if k != 'validate in a fit']  # it closes the logger's file
    spec['loader'] = one(LOADERS) if is_image else rng.choice(['TfmdDL', 'KeyedDL'])
    if is_image:
        spec |= dict(item=one(ITEM_TFMS), batch=one(BATCH_TFMS), workers=rng.choice((0, 0, 0, 0, 0, 0, 1, 2)), bs=rng.choice((4, 5)), shuffle=rng.random() < 0.8, drop_last=rng.random() < 0.5)
        if spec['loader'] == 'torch, persistent': spec['workers'] = 1
        if spec['loader'] in TORCHS and spec['batch'] == 'BatchAugment': spec['batch'] = 'none'  # it needs a KeyedDL
    if 'eyed' in spec['loader']: spec['every'] = rng.choice((None, 1, 2))
    return spec


class Moments(Callback):
    "Notes the events of all trainings of a Learner, and calls `stop` at the event number `at`"
    order, not_saved = 900, True
    noted = 'before_train before_batch after_loss after_step after_batch after_train before_validate after_validate after_epoch'.split()
    def __init__(self, at=None, stop=None): self.at, self.stop, self.events, self.n_fits, self.n_steps = at, stop, [], 0, 0

    def __call__(self, event):
        if event == 'before_fit' and in_fit(self.learn): self.n_fits += 1
        if event == 'after_step': self.n_steps += 1
        if event not in self.noted: return
        self.events.append((self.n_fits, self.learn.epoch, event, self.learn.training and event in self.noted[1:5]))
        if self.at == len(self.events) - 1: self.stop()


class Broken(Exception): "In the place of a kill"


def break_off(): raise Broken('here')  # fastai reads the argument of an exception in a callback
def interrupt(): signal.raise_signal(signal.SIGINT)
def kill(): os.kill(os.getpid(), signal.SIGKILL)


STOPS = dict(exception=break_off, interrupt=interrupt, SIGKILL=kill)


def moments(events, rng):
    "Three moments of a fit with these `events`: number and name of each"
    first = events[0][:2]
    of_training = [i for i, o in enumerate(events) if o[3]]
    kinds = {'middle of the first epoch': [i for i in of_training if events[i][:2] == first][2:], 'end of an epoch': [i for i, o in enumerate(events) if not o[3]][1:],
             'middle of a later epoch': [i for i in of_training if events[i][:2] != first]}
    for name, found in kinds.items():
        at = rng.choice(found)
        fit, epoch, event, _ = events[at]
        yield name, at, f'{event} in epoch {epoch + 1}' + (f' of fit {fit}' if fit > 1 else '')


def build(spec, folder, moments):
    "A Learner of `spec` with new weights, data and callbacks"
    learner = dict(tabular=tabular, text=text).get(spec['model'])
    kwargs = dict(loss_func=LOSSES[spec['loss']](), opt_func=OPTS[spec['opt']], metrics=accuracy, path=folder)
    learn = learner(spec, **kwargs) if learner else Learner(image_dls(spec), IMAGE_MODELS[spec['model']](), splitter=splitter, **kwargs)
    return quiet(learn).add_cbs([*(CALLBACKS[k]() for k in spec['callbacks']), moments, Checkpoint(folder/'run', every=spec.get('every'))])


def fit(spec, folder, seed, at=None, how=None):
    "A Learner of `spec`, made from `seed`, and its fit up to the event `at`; with the events that it had"
    folder.mkdir(exist_ok=True)
    set_seed(seed)
    noted = Moments(at, STOPS.get(how))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        learn = build(spec, folder, noted)
        try: SCHEDULES[spec['schedule']](learn)
        except (Broken, Stopped):
            if at is None: raise
        except Exception as e:
            if noted.n_steps or not isinstance(e, (ResumeError, ValueError)): raise
            return None, one_message(e)
    return learn, noted.events


def one_message(e):
    "The message of an error, without what is different in each run"
    text = re.sub(r'Exception occured in .*?:\s*', '', ' '.join(str(e).split()))
    return re.sub(rf'{re.escape(tempfile.gettempdir())}/\S*/[a-z ]*(run/checkpoints/)?(?=\d\d-|run)', '', text)


def bits(learn, folder):
    "A hash of weights, optimizer, the Recorder's values and what a CSVLogger has written, but for the times"
    tensors, h = [], hashlib.blake2b(digest_size=8)
    state = dict(model=learn.model.state_dict(), opt=learn.opt.state_dict(), values=[*map(list, learn.recorder.values)])
    h.update(json.dumps(encode(state, tensors)).encode())
    for t in tensors: h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    if (csv := folder/'history.csv').exists(): h.update('\n'.join(o.rpartition(',')[0] for o in csv.read_text().splitlines()).encode())
    return h.hexdigest()


def fit_alone(*args):
    "`fit` in a process that was just made; its workers are forked, as some parts are local functions, which cannot be pickled"
    multiprocessing.set_start_method('fork', force=True)
    fit(*args)


def in_process(*args):
    "`fit` in a process of its own; whether it was killed"
    p = multiprocessing.get_context('forkserver').Process(target=fit_alone, args=args)
    p.start()
    p.join()
    return p.exitcode == -signal.SIGKILL


def outcome(spec, folder, at, how, whole):
    "'equal', 'refused: ...' or 'DIFFERS: ...' for a fit that was stopped at the event `at` and is resumed"
    try:
        if how == 'SIGKILL' and not in_process(spec, folder, 0, at, how): return 'DIFFERS: it was not killed'
        if how != 'SIGKILL': fit(spec, folder, 0, at, how)
        learn, found = fit(spec, folder, 1)
        if learn is None: return f'refused: {found}'
        return 'equal' if bits(learn, folder) == whole else 'DIFFERS: other bits'
    except Exception as e: return f'DIFFERS: {type(e).__name__}: {one_message(e)}'


def trial(seed, number, killed=False):
    "A configuration, stopped at three moments: a dict for the results"
    rng = random.Random(f'{seed} {number}')
    spec, start = draw(rng), time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        learn, events = fit(spec, tmp/'whole', 0)
        if learn is None: return dict(number=number, **spec, stopped=[dict(moment='none', outcome=f'refused: {events}')])
        whole, stopped = bits(learn, tmp/'whole'), []
        for moment, at, where in moments(events, rng):
            how = 'SIGKILL' if killed else rng.choice(('exception', 'exception', 'interrupt'))
            stopped.append(dict(moment=moment, where=where, how=how, outcome=outcome(spec, tmp/moment, at, how, whole)))
    return dict(number=number, **spec, stopped=stopped, seconds=round(time.perf_counter() - start, 1))


def trials(n, seed, killed=0):
    "`n` configurations, the last `killed` of them with SIGKILL"
    for i in range(n): yield trial(seed, i, i >= n - killed)


def main():
    p = options(__doc__)
    p.add_argument('--n', type=int, default=100, help='configurations')
    p.add_argument('--killed', type=int, default=10, help='of these, the last ones, in processes that are killed')
    p.add_argument('--seed', type=int, default=0, help='of the configurations and the moments')
    p.add_argument('--only', type=int, nargs='*', default=[], help='numbers of configurations; nothing is saved')
    args = parse(p)
    results = []
    print('| n | configuration | moment | outcome |', '|---|---|---|---|', sep='\n')
    for o in (trial(args.seed, i) for i in args.only) if args.only else trials(args.n, args.seed, args.killed):
        results.append(o)
        what = ', '.join(f'{k} {v}' for k, v in o.items() if k not in ('number', 'stopped', 'seconds') and v not in ([], None))
        for i, s in enumerate(o['stopped']): print(f"| {o['number']} | {what if i == 0 else ''} | {s.get('where', 'start')}, {s.get('how', '')} | {s['outcome']} |", flush=True)
    counts = Counter(s['outcome'].partition(':')[0] for o in results for s in o['stopped'])
    print(f'\n{len(results)} configurations, {counts.total()} moments: {", ".join(f"{v} {k}" for k, v in counts.items())}')
    if not args.only:
        save([dict(what='stopped and resumed', measure='same weights, optimizer and values, or refused', n=len(results), counts=counts, values=results,
                   settings=dict(seed=args.seed, killed=args.killed), **facts())], args.out)
    sys.exit(counts['DIFFERS'] > 0)


if __name__ == '__main__': main()
