"Any Learner: a fit that is broken off and taken up in a new Learner ends with the same bits, or is refused by the name of what differs"
import array
import itertools
import random
import signal
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.data.core import DataLoaders, Datasets, TfmdLists
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy, error_rate, top_k_accuracy
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.torch_core import TensorCategory, set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.core import TensorImage
from fasttransform import Pipeline, Transform
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from s9_fastai.core.signals import SignalNote
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.augment.keyed import KeyedDL
from s9_fastai.resume.changed import in_workers
from s9_fastai.resume.saved import ResumeError
from s9_fastai.test_utils import quiet, synth_dls, synth_groups, synth_learner, synth_model

EPOCHS = 3


class Break(Callback):
    "Ends a fit at the end of `epoch`, before it is saved"
    order, epoch_ = 900, None
    def after_epoch(self):
        if self.epoch == self.epoch_ and not self.lock.locked(): raise SystemError('broken off')


def weights(learn): return torch.cat([v.detach().double().flatten() for v in learn.model.state_dict().values() if isinstance(v, torch.Tensor)])


def fit(make, run_dir, number, stop=None, run=None, **kwargs):
    "A new Learner, unlike the last one in all that is drawn; broken off in the epoch `stop`"
    set_seed(number)
    Break.epoch_ = stop
    learn = quiet(make())
    learn.add_cbs([Break(), Checkpoint(run_dir, **kwargs)])
    run = run or partial(Learner.fit, n_epoch=EPOCHS)
    if stop is None: run(learn)
    else:
        with pytest.raises(SystemError): run(learn)
    return learn


def same(make, tmp_path, run=None, stops=(1, 2)):
    "A whole fit, and one broken off in two epochs: the same weights, losses and metrics, without a warning"
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*cannot be saved')
        whole = fit(make, tmp_path/'whole', 0, run=run)
        for i, stop in enumerate([*stops, None]): learn = fit(make, tmp_path/'broken', i, stop, run=run)
    assert torch.equal(weights(whole), weights(learn)), (weights(whole) - weights(learn)).abs().max()
    assert repr(whole.recorder.values) == repr(learn.recorder.values)
    return whole, learn


def push(learn, by):
    "Moves the weights by a number, so that every difference is seen"
    with torch.no_grad(): next(learn.model.parameters()).add_(1e-3*float(by))


# State in attributes

class Kept(Callback):
    "Draws its number from the attribute `state`"
    def __init__(self, make, draw): self.state, self.draw = make(), draw
    def after_step(self): push(self.learn, self.draw(self))


def after(f):
    "`f(state)` changes the state, and its value is that of the next step"
    def draw(self):
        f(self.state)
        return sum(map(float, self.state))
    return draw


def seed(): return random.getrandbits(31)  # another one in each Learner


def rebound(f):
    def draw(self):
        self.state = f(self.state)
        return abs(complex(self.state)) if not isinstance(self.state, (str, bytes)) else len(self.state)
    return draw


def torch_draw(self): return torch.rand(1, generator=self.state).item()
def numpy_draw(self): return self.state.random()
def nested_draw(self): return self.state['a'][0].random() + self.state['b'].random()
def order_draw(self):
    random.shuffle(self.state)
    return self.state[0]


class Phase(Enum): HEAD, BODY = 1, 2
class Level(IntEnum): LOW, HIGH = 1, 2


def is_first(self):
    "Compares by identity, and goes to the next member"
    was, self.state = self.state, [*type(self.state)][1]
    return was is [*type(was)][0]


def nested(new, change):
    "A container that the first step makes in a dict"
    def draw(self): return change(self.state.setdefault('a', new()))
    return dict, draw


def turn(o):
    o.move_to_end(next(iter(o)))
    return next(iter(o.values()))


def count_up(o):
    o['x'] += 1
    return o['x']


def rounded(self):
    self.state = self.state*np.float32(0.9) + np.float32(0.1)
    return self.state*1e6 % 1


def is_image(self):
    was, self.state = self.state, TensorImage(torch.ones(1))
    return isinstance(was, TensorImage)


kinds = {
    'random.Random': (lambda: random.Random(seed()), numpy_draw), 'numpy Generator': (lambda: np.random.default_rng(seed()), numpy_draw),
    'Philox': (lambda: np.random.Generator(np.random.Philox(seed())), numpy_draw), 'RandomState': (lambda: np.random.RandomState(seed()), lambda self: self.state.rand()),
    'torch Generator': (lambda: torch.Generator().manual_seed(seed()), torch_draw), 'nested generators': (lambda: dict(a=[random.Random(seed())], b=np.random.default_rng(seed())), nested_draw),
    'deque': (lambda: deque([1], maxlen=3), after(lambda s: s.append(s[-1] + 1))), 'set': (lambda: {1}, after(lambda s: s.add(len(s) + 1))),
    'list': (lambda: [*range(12)], order_draw), 'Counter': (Counter, lambda self: self.state.update('a') or self.state['a']),
    'text': (lambda: '', rebound(lambda s: s + 'x')), 'bytes': (lambda: b'', rebound(lambda s: s + b'x')), 'complex': (lambda: 0j, rebound(lambda s: s + 1j)),
    'Decimal': (lambda: Decimal(0), rebound(lambda s: s + Decimal('0.1'))), 'count': (itertools.count, lambda self: next(self.state)),
    'Enum': (lambda: Phase.HEAD, is_first), 'IntEnum': (lambda: Level.LOW, is_first), 'float32': (lambda: np.float32(0), rounded), 'class of a tensor': (lambda: torch.ones(1), is_image),
    'new OrderedDict': nested(lambda: OrderedDict(a=1, b=2), turn), 'new defaultdict': nested(lambda: defaultdict(int), count_up),
    'numpy array': (lambda: np.zeros(3), lambda self: self.state.__iadd__(1)[0]), 'tensor': (lambda: torch.zeros(3), lambda self: self.state.add_(1)[0])}


@pytest.mark.parametrize('kind', kinds)
def test_an_attribute_of_a_callback(tmp_path, kind):
    same(lambda: synth_learner(cbs=Kept(*kinds[kind])), tmp_path)


class Helper:
    "An object with state that no file of numbers could make anew"
    def __init__(self): self.rng, self.n, self.text, self.lock = random.Random(seed()), 0, '', print
    def __call__(self, x):
        self.n += 1
        self.text += 'x'
        return x*(1 + 0.01*self.rng.random() + 0.001*self.n + 0.001*len(self.text)) if x.is_floating_point() else x


class Slotted:
    __slots__ = ('n', '__dict__')
    def __init__(self): self.n = 0
    def __call__(self, x):
        self.n += 1
        return x + self.n*0.01 if x.is_floating_point() else x


def closure():
    n = 0
    def tfm(x):
        nonlocal n
        n += 1
        return x + n*0.01 if x.is_floating_point() else x
    return tfm


def by_keyword(x, h=None): return h(x)
def brighter(x, n): return x + n*0.01 if x.is_floating_point() else x


def numbered():
    def tfm(x):
        tfm.n += 1
        return brighter(x, tfm.n)
    tfm.n = 0
    return tfm


def by_default():
    def tfm(x, seen=[]):  # noqa: B006 (that is the case)
        seen.append(1)
        return brighter(x, len(seen))
    return tfm


class Passes:
    "Its attribute has the name of one that a loader has for an epoch"
    def __init__(self): self.it = 0
    def __call__(self, x):
        self.it += 1
        return brighter(x, self.it)


class Single:
    "A state of one value, which no callback keeps"
    def __init__(self, state, change): self.state, self.change = state, change
    def __call__(self, x):
        self.state, n = self.change(self.state)
        return brighter(x, n)


def one_of_many(o):
    o[7] += 1
    return o, o[7]


def large(o): return (o := torch.where(torch.arange(5000) == 7, o + 1, o)), o[7]


def with_tfm(tfm, place):
    dls = synth_dls(seed=0)
    for dl in dls.loaders: setattr(dl, place, Pipeline([tfm]))
    return synth_learner(dls)


holders = {'attribute of a function': numbered, 'default of a function': by_default, 'attribute called it': Passes, 'Decimal': lambda: Single(Decimal(1), lambda o: (o + 1, float(o))),
           'long list': lambda: Single([0]*40_000, one_of_many), 'large tensor': lambda: Single(torch.zeros(5000), large), 'object': Helper, 'slots': Slotted, 'closure': closure, 'keyword of a partial': lambda: partial(by_keyword, h=Helper())}


@pytest.mark.parametrize('holder', holders)
@pytest.mark.parametrize('place', ['after_item', 'after_batch'])
def test_an_attribute_of_a_transform(tmp_path, holder, place):
    same(lambda: with_tfm(holders[holder](), place), tmp_path)


class Helped(Callback):
    def __init__(self): self.helpers = [Helper(), Helper()]
    def after_step(self): push(self.learn, self.helpers[1](torch.ones(1)))


class Counting(nn.Module):
    "Counts its batches, in an attribute and in a buffer that is in no state_dict"
    def __init__(self):
        super().__init__()
        self.net, self.n = synth_model(), 0
        self.register_buffer('mean', torch.zeros(1), persistent=False)
    def forward(self, x):
        if self.training:
            self.n += 1
            self.mean.lerp_(x.mean().detach()[None], 0.5)
        return self.net(x)*(1 + self.n/100) + self.mean


class Curriculum(CrossEntropyLossFlat):
    def __init__(self):
        super().__init__()
        self.n = 0
    def __call__(self, p, t, **kwargs):
        self.n += 1
        return super().__call__(p, t, **kwargs)*(1 + self.n/100)


class OnLearner(Callback):
    "Writes where every callback can read"
    def before_fit(self): self.learn.n_seen = 0
    def after_step(self):
        self.learn.n_seen += 1
        push(self.learn, self.learn.n_seen)


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = synth_model(), {}
    def forward(self, x):
        if self.training: self.seen['n'] = self.seen.get('n', 0) + 1
        return self.net(x)*(1 + self.seen.get('n', 0)/100)
    def get_extra_state(self): return self.seen
    def set_extra_state(self, state): self.seen = state


class Frozen(Callback):
    "Trains the head alone in the first epoch"
    def before_epoch(self):
        if self.epoch == 0: self.learn.freeze()
        if self.epoch == 1: self.learn.unfreeze()


class InSlots(Callback):
    __slots__ = ('n',)
    def __init__(self): self.n = 0
    def after_step(self):
        self.n += 1
        push(self.learn, self.n)


class Once(Callback):
    "Does `f` to the model in the first epoch"
    def __init__(self, f): self.f = f
    def before_epoch(self):
        if self.epoch == 0: self.f(self.learn)


def batch_normed(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
def other_momentum(learn): learn.model[1].momentum = 0.5


class ByItself(Callback):
    "Decides what is kept"
    def __init__(self): self.figure = iter(range(100))
    def after_step(self): push(self.learn, next(self.figure))
    def state_dict(self): return dict(left=[*self.figure][0])
    def load_state_dict(self, state): self.figure = iter(range(state['left'], 100))


class Rebinds(ByItself):
    def state_dict(self):
        self.figure, copy = itertools.tee(self.figure)
        return dict(left=next(copy))


others = {'helpers in a list': lambda: synth_learner(cbs=Helped()), 'counters and buffers of a model': lambda: synth_learner(model=Counting()),
          'counter of a loss': lambda: synth_learner(loss_func=Curriculum()), 'attribute of the Learner': lambda: synth_learner(cbs=OnLearner()),
          'extra state': lambda: synth_learner(model=Extra()), 'frozen on the way': lambda: synth_learner(splitter=synth_groups, cbs=Frozen()),
          'slots of a callback': lambda: synth_learner(cbs=InSlots()), 'momentum of a batch norm': lambda: synth_learner(model=batch_normed(), cbs=Once(other_momentum)),
          'state_dict of a callback': lambda: synth_learner(cbs=Rebinds()), 'mixup': lambda: synth_learner(cbs=MixUp())}


# Values that belong to no object

class OfTheClass(Callback):
    "Counts in an attribute of the class"
    seen = 0
    def after_step(self):
        type(self).seen += 1
        push(self.learn, type(self).seen)


counted, rows = 0, []


class OfTheModule(Callback):
    "Counts in global variables"
    def after_step(self):
        global counted
        counted += 1
        rows.append(counted)
        push(self.learn, counted + len(rows))


def drawn_by_function(x, y):
    "A loss function with a global counter"
    rows.append(len(rows))
    return nn.functional.cross_entropy(x, y)*(1 + 0.01*len(rows))


shared = {'class': lambda: synth_learner(cbs=OfTheClass(), metrics=accuracy), 'module': lambda: synth_learner(cbs=OfTheModule(), metrics=accuracy),
          'function': lambda: synth_learner(loss_func=drawn_by_function, metrics=accuracy)}


@pytest.mark.parametrize('name', shared)
def test_values_of_classes_and_modules(tmp_path, name):
    def afresh():
        "As in a new process"
        global counted
        OfTheClass.seen = counted = 0
        rows.clear()
        return shared[name]()
    same(afresh, tmp_path)


@pytest.mark.parametrize('name', others)
def test_state_elsewhere(tmp_path, name): same(others[name], tmp_path)


# Loaders

def data(n=48): return TensorDataset(torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 10)


def torch_dls(sampler=None, **kwargs):
    ds = data()
    trn = torch.utils.data.DataLoader(ds, 16, sampler=sampler and sampler(ds), **kwargs)
    return DataLoaders(trn, torch.utils.data.DataLoader(ds, 16), device='cpu')


class Turns:
    "A sampler that begins elsewhere in each epoch"
    def __init__(self, ds): self.n, self.begin = len(ds), 0
    def __len__(self): return self.n
    def __iter__(self):
        self.begin += 5
        return iter([(i + self.begin) % self.n for i in range(self.n)])


def gen(): return torch.Generator().manual_seed(seed())


class Stream(IterableDataset):
    "In another order in each epoch"
    def __init__(self, n): self.data, self.n, self.rng = data(n), n, random.Random(seed())
    def __len__(self): return self.n
    def __iter__(self): return iter([self.data[i] for i in self.rng.sample(range(self.n), self.n)])


loaders = {'shuffled by torch': lambda: torch_dls(shuffle=True), 'generator of a loader': lambda: torch_dls(shuffle=True, generator=gen()),
           'generator of a sampler': lambda: torch_dls(lambda ds: RandomSampler(ds, generator=gen())), 'weights': lambda: torch_dls(lambda ds: WeightedRandomSampler(torch.arange(48.), 48, generator=gen())),
           'counting sampler': lambda: torch_dls(Turns), 'stream': lambda: DataLoaders(DataLoader(Stream(32), bs=16), DataLoader(Stream(16), bs=16)),
           "fastai's": lambda: DataLoaders(DataLoader(data(), bs=16, shuffle=True), DataLoader(data(), bs=16))}


@pytest.mark.parametrize('name', loaders)
def test_loaders(tmp_path, name): same(lambda: synth_learner(loaders[name](), metrics=accuracy), tmp_path)


# What cannot be kept is named

class Lost(Callback):
    def __init__(self): self.lines = (i for i in range(1000))
    def after_step(self): push(self.learn, next(self.lines))


class Declared(Lost): not_saved = ('lines',)


def test_what_cannot_be_kept_is_named_once_and_refused(tmp_path):
    def make(): return synth_learner(cbs=Lost())
    with pytest.warns(UserWarning, match=r'lost\.lines changed in this fit and cannot be saved') as found: fit(make, tmp_path, 0, 2)
    assert len([o for o in found if 'cannot be saved' in str(o.message)]) == 1
    with pytest.raises(ResumeError, match=r'lost\.lines had changed and could not be saved, .*give its class state_dict and load_state_dict, or the attribute to not_saved'): fit(make, tmp_path, 1)
    with pytest.warns(UserWarning, match='lost.lines had changed .* is resumed without'): fit(make, tmp_path, 1, force=True)


def test_the_remedies_for_what_cannot_be_kept(tmp_path):
    same(lambda: synth_learner(cbs=Rebinds()), tmp_path/'a')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*cannot be saved')
        fit(lambda: synth_learner(cbs=Declared()), tmp_path/'b', 0, 1)
        fit(lambda: synth_learner(cbs=Declared()), tmp_path/'b', 0)


class Number:
    n = 0


def grow(o):
    for x in o: x.n += 1
    return o, o[0].n


def used(o, change, number=lambda o: 1):
    change(o)
    return o, number(o)


def exchange(learn): learn.model[1] = nn.GELU()
def hook(learn): learn.model[1].register_forward_hook(lambda m, i, o: o*0.9)
def add_callback(learn): learn.add_cb(InSlots())


unkept = {'state': {'DataFrame': (lambda: pd.DataFrame(dict(a=[1.])), lambda o: used(o, lambda o: o.__setitem__('a', o['a'] + 1))), 'image': (lambda: Image.new('L', (2, 2)), lambda o: used(o, lambda o: o.putpixel((0, 0), 5))),
                    'sparse': (lambda: torch.eye(2).to_sparse(), lambda o: (o*2, 1)), 'array': (lambda: array.array('d'), lambda o: used(o, lambda o: o.append(1))), 'memory': (lambda: memoryview(bytearray(1)), lambda o: used(o, lambda o: o.__setitem__(0, 5))),
                    'seeds': (lambda: np.random.SeedSequence(3), lambda o: used(o, lambda o: o.spawn(1))), 'many objects': (lambda: [Number() for _ in range(150)], grow)},
          'model': {'model.(layers)': exchange, 'model.1.(hooks)': hook, 'in_slots': add_callback}}


@pytest.mark.parametrize('kind', unkept['state'])
def test_a_value_that_no_file_can_have_is_named(tmp_path, kind):
    new, change = unkept['state'][kind]
    with pytest.warns(UserWarning, match=r'f\.state changed in this fit and cannot be saved'): fit(lambda: with_tfm(Single(new(), change), 'after_batch'), tmp_path, 0, 1)


@pytest.mark.parametrize('name', unkept['model'])
def test_another_structure_is_named(tmp_path, name):
    with pytest.warns(UserWarning) as found: fit(lambda: synth_learner(cbs=Once(unkept['model'][name])), tmp_path, 0, 1)
    assert any(name in str(o.message) and 'changed in this fit and cannot be saved' in str(o.message) for o in found)


class Own(Transform):
    "Draws from a generator of its own"
    def __init__(self): self.rng = random.Random(seed())
    def encodes(self, x:TensorImage): return x + self.rng.random()


@pytest.mark.parametrize('workers, kw, named', [(0, dict(every=1), False), (1, dict(), False), (1, dict(every=1), True)], ids=['none', 'whole epochs', 'within an epoch'])
def test_a_generator_in_a_worker_process(tmp_path, workers, kw, named):
    x = torch.rand(8, 3, 8, 8)
    def make():
        dsets = Datasets(tls=[TfmdLists([*range(8)], lambda i: TensorImage(x[i]), splits=[range(6), range(6, 8)]), TfmdLists([*range(8)], lambda i: TensorCategory(i), splits=[range(6), range(6, 8)])])
        return synth_learner(DataLoaders(*(KeyedDL(o, bs=2, num_workers=workers, after_item=[Own()], seed=1) for o in (dsets.train, dsets.valid))))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        fit(make, tmp_path, 0, 1, **kw)
    found = [str(o.message) for o in found if 'cannot be saved' in str(o.message)]
    assert [bool(found), any('after_item.fs[0].rng, in a worker process, changed' in o for o in found)] == [named]*2


class Drawn(torch.utils.data.Dataset):
    "Draws from a global generator"
    def __len__(self): return 16
    def __getitem__(self, i): return torch.rand(3, 8, 8), i % 10


def test_workers_that_persist_keep_their_global_generators():
    def dls(persist): return DataLoaders(*[torch.utils.data.DataLoader(Drawn(), 8, num_workers=1, persistent_workers=persist)]*2)
    assert in_workers(dls(False), False) == [] and in_workers(dls(True), False) == ['the global random generators, in a worker process,']*2


def test_what_a_transform_keeps_of_one_item_is_no_state_of_a_worker():
    "It is overwritten for the next item; a counter is not, and what stays of the item before changes the next one"
    class Keeps(Transform):
        last = None
        def encodes(self, x:TensorImage):
            before, self.last = self.last, x
            return x if before is None else x + before
    class Passing(Transform):
        def encodes(self, x:TensorImage):
            self.drawn = random.random()
            return x + self.drawn
    def found(tfm): return in_workers(DataLoaders(*[DataLoader([TensorImage(torch.ones(3, 2, 2))]*4, bs=2, num_workers=1, after_item=Pipeline([tfm]))]*2), True)[:1]
    assert found(Passing()) == [] and found(Keeps()) == ['loaders[0].after_item.fs[0].last, in a worker process,']


def test_lazy_layers_are_refused_with_a_remedy_that_works(tmp_path):
    def make(): return synth_learner(model=nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10)))
    with pytest.raises(ValueError, match=r'0.weight has no shape yet.*learn.model\(\*learn.dls.one_batch\(\)\[:learn.dls.n_inp\]\)'): fit(make, tmp_path, 0)
    def warm():
        learn = make()
        learn.model(*learn.dls.one_batch()[:learn.dls.n_inp])
        return learn
    same(warm, tmp_path/'run')


# The same process, as in a notebook after Ctrl-C

@pytest.mark.parametrize('name', ['object', 'closure', 'slots'])
def test_the_same_learner_after_an_error(tmp_path, name):
    "What the broken epoch has changed is undone"
    def make(): return with_tfm(holders[name](), 'after_batch')
    whole = fit(make, tmp_path/'whole', 0)
    for stop in (0, 1):
        learn = fit(make, tmp_path/str(stop), 0, stop)
        Break.epoch_ = None
        learn.fit(EPOCHS)
        assert torch.equal(weights(whole), weights(learn))


def test_a_counter_that_the_constructor_was_given(tmp_path):
    class Counted(nn.Module):
        def __init__(self, n=0):
            super().__init__()
            self.net, self.n = synth_model(), n
        def forward(self, x):
            self.n += self.training
            return self.net(x)*(1 + self.n/10)
    def make(): return synth_learner(model=Counted())
    whole = fit(make, tmp_path/'whole', 0)
    learn = fit(make, tmp_path/'run', 0, 1)
    Break.epoch_ = None
    learn.fit(EPOCHS)
    assert torch.equal(weights(whole), weights(learn)) and learn.model.n == whole.model.n == 12


# Changed settings

class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.net, self.by = synth_model(), by
    def forward(self, x): return self.net(x)*self.by


def drop(p): return nn.Sequential(*synth_model()[:4], nn.Dropout(p), synth_model()[4])
def act(f): return nn.Sequential(synth_model()[0], f(), *synth_model()[2:])
def loss(w): return CrossEntropyLossFlat(weight=torch.linspace(1, w, 10))
def aug(p): return with_tfm(aug_transforms(max_lighting=p)[1], 'after_batch')
def adamw(betas): return partial(OptimWrapper, opt=partial(torch.optim.AdamW, betas=betas))
def train(**kwargs): return synth_learner(synth_dls(**kwargs))
def metric(f): return synth_learner(metrics=f)
def loaded(**kwargs): return synth_learner(DataLoaders(DataLoader(data(), bs=16, **kwargs), DataLoader(data(), bs=16)))


changes = {'model': (lambda p: synth_learner(model=drop(p)), 0.1, 0.2), 'model ': (lambda f: synth_learner(model=act(f)), nn.ReLU, nn.GELU), 'model  ': (lambda by: synth_learner(model=Scaled(by)), 1., 2.),
           'loss_func': (lambda w: synth_learner(loss_func=loss(w)), 2, 3), 'after_batch': (aug, 0.2, 0.3), 'items': (lambda s: train(seed=s), 0, 1), 'loader': (lambda s: loaded(shuffle=s), True, False),
           'loader ': (lambda s: loaded(drop_last=s), True, False), 'optimizer': (lambda m: synth_learner(opt_func=partial(SGD, mom=m)), 0.9, 0.8), 'optimizer ': (lambda m: synth_learner(opt_func=partial(Adam, sqr_mom=m)), 0.99, 0.9),
           'optimizer  ': (lambda b: synth_learner(opt_func=adamw(b)), (0.9, 0.99), (0.9, 0.9)), 'metrics': (metric, accuracy, error_rate), 'metrics ': (lambda k: metric(partial(top_k_accuracy, k=k)), 2, 3),
           'metrics  ': (lambda how: metric(F1Score(average=how)), 'macro', 'micro'), 'train_bn': (lambda t: synth_learner(train_bn=t), True, False),
           'callback mix_up': (lambda a: synth_learner(cbs=MixUp(a)), 0.4, 0.5)}


@pytest.mark.parametrize('name', changes)
def test_a_changed_setting_is_named(tmp_path, name):
    make, then, now = changes[name]
    fit(partial(make, then), tmp_path, 0, 1)
    with pytest.raises(ResumeError, match=f'settings have changed since the run stopped: {name.strip()} was ') as e: fit(partial(make, now), tmp_path, 0)
    assert 'function' not in str(e.value) and ' at 0x' not in str(e.value)
    fit(partial(make, then), tmp_path, 0)


def split_dls(idxs, vocab=10):
    ds = data()
    trn, val = (torch.utils.data.Subset(ds, i) for i in (idxs, [i for i in range(48) if i not in idxs]))
    dls = DataLoaders(DataLoader(trn, bs=8), DataLoader(val, bs=8))
    dls.vocab = [*range(vocab)]
    return dls


def test_a_checkpoint_does_not_read_the_whole_data_set(tmp_path):
    "`TfmdLists` is a list that makes an item each time: a look through it would open every file before the first batch"
    x, y = data().tensors
    class Seen: n = 0  # on a class: what a closure holds is put back after such a look
    def image(i):
        Seen.n += 1
        return x[i]
    def label(i): return y[i]
    def reads(**kwargs):
        Seen.n = 0
        dsets = Datasets(range(48), [[image], [label]], splits=(range(32), range(32, 48)))
        with synth_learner(dsets.dataloaders(bs=16, num_workers=0), **kwargs).no_bar() as learn: learn.fit(1)
        return Seen.n
    assert reads(cbs=Checkpoint(tmp_path)) - reads() == 2*5  # four items of each set, the first of them twice


def test_another_split_of_the_same_images_is_refused(tmp_path):
    "As a RandomSplitter without a seed makes, or the second fold of a k-fold"
    def make(idxs, vocab=10): return lambda: synth_learner(split_dls(idxs, vocab))
    a, b = [*range(32)], [*range(16, 48)]
    fit(make(a), tmp_path, 0)
    with pytest.raises(ResumeError, match=r'items was 32 items, \w+, is 32 items, \w+ \(these are other items, or another split of them: give the splitter a seed'): fit(make(b), tmp_path, 0)
    with pytest.raises(ResumeError, match='valid_items was 16 items'): fit(make(b), tmp_path, 0)
    with pytest.raises(ResumeError, match='vocab was'): fit(make(a, 11), tmp_path, 0)
    fit(make(a), tmp_path, 0)


def test_a_display_may_come_or_go_and_a_callback_is_named_alone(tmp_path):
    class Shown(Callback): not_saved = True
    class Printing(Callback): "Changes nothing, but nobody can see that"
    fit(synth_learner, tmp_path, 0, 1)
    fit(lambda: synth_learner(cbs=[Shown(), CSVLogger(tmp_path/'x.csv')]), tmp_path, 0, 2)
    with pytest.raises(ResumeError, match='stopped: callback printing was nothing, is printing. Set'): fit(lambda: synth_learner(cbs=Printing()), tmp_path, 0)
    fit(synth_learner, tmp_path, 0)


@pytest.mark.parametrize('append', [False, True])
def test_csv_logger_keeps_its_rows(tmp_path, append):
    def make(): return synth_learner(cbs=CSVLogger('log.csv', append), metrics=accuracy, path=tmp_path/folder)
    folder = 'whole'
    for nm in ('whole', 'broken'): (tmp_path/nm).mkdir()
    fit(make, tmp_path/'whole'/'run', 0)
    folder = 'broken'
    for i, stop in enumerate((1, 2, None)): fit(make, tmp_path/'broken'/'run', i, stop)
    a, b = (pd.read_csv(tmp_path/nm/'log.csv').drop(columns='time') for nm in ('whole', 'broken'))
    assert a.equals(b) and len(a) == EPOCHS


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert Checkpoint('~/run').run_dir == tmp_path/'run'
    (tmp_path/'file').write_text('x')
    with pytest.raises(FileExistsError, match='run_dir is .*file, a file: name a folder'): Checkpoint(tmp_path/'file')


@pytest.fixture
def interruptible():
    "SIGINT as in a terminal: a shell ignores it for what it starts in the background"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_in_another_fit_after_one_that_failed(tmp_path, interruptible):
    "A `Checkpoint` whose fit an error ended left its handlers behind: they must not take the interrupt of a fit that cannot be resumed"
    class Boom(Callback):
        def after_batch(self): raise ValueError('boom')
    class Interrupt(Callback):
        def after_batch(self): signal.raise_signal(signal.SIGINT)
    with pytest.raises(ValueError, match='boom'): quiet(synth_learner(cbs=[Checkpoint(tmp_path), Boom()])).fit(1)
    learn = quiet(synth_learner(cbs=Interrupt()))
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert learn.iter == 0


def test_a_note_begun_outside_a_fit_takes_no_signal_of_a_fit(interruptible):
    class Interrupt(Callback):
        def after_batch(self): signal.raise_signal(signal.SIGINT)
    note = SignalNote()
    note.catch()
    try:
        with pytest.raises(KeyboardInterrupt): quiet(synth_learner(cbs=Interrupt())).fit(1)
    finally: note.release()
    assert note.signum is None


# Any combination

sample = 1, 5, 6, 7, 11


def test_random_configurations(monkeypatch):
    "A few of those of benchmarks/trust/configurations.py: each is stopped at three moments, and resumed with the same bits or refused"
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent/'benchmarks'/'trust')
    from configurations import trial
    outcomes = [o['outcome'] for i in sample for o in trial(0, i)['stopped']]
    assert not [o for o in outcomes if not o.startswith(('equal', 'refused: '))] and outcomes.count('equal') > len(outcomes)/2
