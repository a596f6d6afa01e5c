"""What the processes of test_parallel.py run: `parallel.py FOLDER CASE...` writes FOLDER/CASE.RANK.safetensors, the weights, buffers and recorded
values of a small fit in float64. Without a launcher's variables it is one process, the reference"""
import multiprocessing
import os
import signal
import sys
from functools import partial
from pathlib import Path

import fastai.callback.progress  # noqa: F401 (the Recorder)
import numpy as np
import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders, Datasets, TfmdLists
from fastai.learner import Learner, Metric
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import Dice, F1Score, Perplexity, accuracy, error_rate
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn

from s9_fastai.augment.keyed import make_keyed
from s9_fastai.core.ranks import n_ranks, this_rank
from s9_fastai.core.signals import Stopped
from s9_fastai.core.weights import write_tensors
from s9_fastai.data.arrays import array_dls
from s9_fastai.data.memory import memory_data
from s9_fastai.training.balance import TrainingLoss
from s9_fastai.training.distill import Distill, TeacherLogits
from s9_fastai.training.distributed import process_group
from s9_fastai.training.ema import EMA
from s9_fastai.training.fast import FastSGD
from s9_fastai.training.freeze import FreezeBody, body_head
from s9_fastai.training.guards import FiniteLoss, NoNormDecay
from s9_fastai.training.metrics import MacroF1, MeanRecall
from s9_fastai.training.muon import FastMuon
from s9_fastai.training.record import EpochRecorder, RunLog
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.training import watch
from s9_fastai.test_utils import quiet

torch.set_num_threads(1)
cases = {}


def case(f):
    cases[f.__name__] = f
    return f


class Exact(Callback):
    "Everything in float64; notes the buffers after each step"
    def before_fit(self):
        self.learn.model.double()
        self.learn.buffers_seen = []
    def before_train(self): self.learn.recorder.smooth_loss.val = self.learn.recorder.smooth_loss.val.double()
    def before_batch(self):
        self.learn.xb, self.learn.yb = (tuple(o.double() if o.is_floating_point() else o for o in b) for b in (self.xb, self.yb))
    def after_step(self): self.learn.buffers_seen.append(torch.cat([b.double().flatten() for b in self.model.buffers()] or [torch.zeros(0)]))


class Loss(nn.CrossEntropyLoss):
    "fastai's `CrossEntropyLossFlat` makes float32 of float64"
    def forward(self, pred, y): return super().forward(pred.flatten(0, -2), y.flatten().long()) if pred.ndim < 4 else super().forward(pred, y)


def images(n, shape=(3, 8, 8), classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, *shape))).float(), torch.from_numpy(rng.integers(0, classes, n))


def tensor_dls(n=29, bs=8, n_valid=11, shape=(3, 8, 8), targets=None, **kwargs):
    "Loaders of images and labels, all batches of both sets"
    x, y = images(n + n_valid, shape)
    if targets: y = targets(x, y)
    dsets = Datasets(tls=[TfmdLists(list(o), None, splits=[range(n), range(n, len(x))]) for o in (x, y)], n_inp=1)
    dls = dsets.dataloaders(**{**dict(bs=bs, device=torch.device('cpu'), num_workers=0, drop_last=False), **kwargs})
    dls.c = 4
    return dls


def net(norm=None, drop=0.):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), norm or nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Dropout(drop),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def train(dls=None, model=None, epochs=2, exact=True, sync_norm=False, recorder=True, cbs=(), around=None, opt_func=partial(SGD, mom=0.9), **kwargs):
    "A fit, and what it has led to"
    set_seed(1)  # as the loaders
    dls = dls() if callable(dls) else dls or tensor_dls()
    torch.manual_seed(2)
    if callable(model) and not isinstance(model, nn.Module): model = model()
    kwargs = dict(dict(loss_func=Loss(), lr=0.05), **kwargs)
    learn = quiet(Learner(dls, model or net(), opt_func=opt_func, cbs=[Exact()]*exact, **kwargs))
    if recorder:
        learn.remove_cb(learn.recorder)
        learn.add_cb(EpochRecorder())
    if n_ranks() == 1:
        for dl in dls.loaders: make_keyed(dl)
    else: set_seed(7 + this_rank())  # the processes differ in what they draw
    if this_rank():  # and in their weights
        with torch.no_grad(): [p.add_(1) for p in learn.model.parameters()]
    with learn.distributed(sync_norm=sync_norm):
        if around: around(learn)
        else: learn.fit(epochs, cbs=list(cbs))
    return learn


def numbers(rows): return torch.tensor([[float('nan') if v is None else float(v) for v in row] for row in rows], dtype=torch.float64)


def state(learn):
    return dict(weights=torch.cat([p.detach().double().flatten() for p in learn.model.parameters()]),
                buffers=torch.cat([b.detach().double().flatten() for b in learn.model.buffers()] or [torch.zeros(0)]),
                seen=torch.stack(learn.buffers_seen) if getattr(learn, 'buffers_seen', None) else torch.zeros(0),
                values=numbers(learn.recorder.values), losses=numbers([learn.recorder.losses]))


# Batches and parts

@case
def uneven(): return train()
@case
def plain_recorder(): return train(recorder=False, metrics=[accuracy, F1Score(average='macro')])
@case
def whole_batch(): return train(lambda: tensor_dls(n=26))
@case
def few_images(): return train(lambda: tensor_dls(n=7, n_valid=1, bs=4), metrics=[accuracy, MeanRecall()])
@case
def odd_size(): return train(lambda: tensor_dls(bs=7), metrics=accuracy)
@case
def drop_last(): return train(lambda: tensor_dls(drop_last=True), metrics=accuracy)


# Optimizers, losses, callbacks

@case
def fast_sgd(): return train(opt_func=FastSGD, wd=0.01, cbs=[NoNormDecay(), FiniteLoss()])
@case
def muon(): return train(opt_func=FastMuon, lr=0.5)
@case
def clip(): return train(cbs=[GradientClip(0.1)])
@case
def accumulate(): return train(lambda: tensor_dls(bs=5), cbs=[GradientAccumulation(12)])
@case
def accumulate_sum(): return train(lambda: tensor_dls(bs=5), cbs=[GradientAccumulation(12)], loss_func=Loss(reduction='sum'), lr=0.002)
@case
def ema(): return train(cbs=[EMA(0.2)], metrics=accuracy)
@case
def ema_norm(): return train(model=lambda: net(nn.BatchNorm2d(8)), sync_norm=True, cbs=[EMA(0.2)], metrics=accuracy)
@case
def sum_loss(): return train(loss_func=Loss(reduction='sum'), lr=0.005)
@case
def training_loss(): return train(cbs=[TrainingLoss(lambda p, y: nn.functional.cross_entropy(p, y, label_smoothing=0.1))])
@case
def training_loss_sum(): return train(lr=0.005, cbs=[TrainingLoss(Loss(reduction='sum'))])
@case
def frozen(): return train(splitter=body_head, cbs=[FreezeBody(1)])
@case
def mixup(): return train(cbs=[MixUp(0.4)], exact=False, loss_func=CrossEntropyLossFlat())


@case
def distill():
    torch.manual_seed(0)
    return train(array_loaders, cbs=[Distill(TeacherLogits(torch.randn(29, 4)), 0.5)], metrics=accuracy)


# Norms and dropout

def norm_case(name, make, shape=(3, 8, 8), sync=True, model=None, **kwargs):
    def f(): return train(lambda: tensor_dls(shape=shape), make, sync_norm=sync, metrics=accuracy, **kwargs)
    cases[name] = f


def net1d(): return nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
def net3d(): return nn.Sequential(nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 4))
def net2d(): return net(nn.BatchNorm2d(8))
def net_fast():
    from s9_fastai.training.layers import fast_layers
    model = net2d()
    fast_layers(model)
    return model
def net_last(): return net2d().to(memory_format=torch.channels_last)


norm_case('norm_1d', net1d, (3, 12))
norm_case('norm_2d', net2d)
norm_case('norm_3d', net3d, (3, 4, 4, 4))
norm_case('norm_last', net_last)
norm_case('norm_fast', net_fast)
cases['norm_whole'] = lambda: train(lambda: tensor_dls(n=26), net2d, sync_norm=True, metrics=accuracy)
norm_case('norm_apart', net2d, sync=False)


class Masks(Callback):
    def before_fit(self):
        self.masks = []
        self.hook = self.learn.model[5].register_forward_hook(lambda m, i, o: self.masks.append((o == 0).flatten()[:16].double()) if m.training else None)
    def after_fit(self):
        self.hook.remove()
        self.learn.buffers_seen = self.masks


@case
def dropout(): return train(model=lambda: net(drop=0.5), cbs=[Masks()])
@case
def dropout_again(): return train(model=lambda: net(drop=0.5), cbs=[Masks()])


# Metrics

class Spread(Metric):
    "A metric that is no mean: the largest logit less the smallest, of all images, times their number"
    def reset(self): self.seen = []
    def accumulate(self, learn): self.seen.append(learn.pred.detach().cpu())
    @property
    def value(self):
        if not self.seen: return None
        o = torch.cat(self.seen)
        return (o.max() - o.min()).item()*len(o)


metrics = [accuracy, error_rate, F1Score(average='macro'), MeanRecall(), MacroF1(), Spread(), Perplexity()]


@case
def many_metrics(): return train(metrics=metrics)
@case
def many_metrics_plain(): return train(metrics=metrics, recorder=False)


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 2, 2, stride=2)
    def forward(self, x): return self.up(self.down(x).relu())


@case
def segmentation():
    return train(lambda: tensor_dls(targets=lambda x, y: (x.mean(1) > 0).long()), Pixels, loss_func=Loss(), metrics=[Dice()])


# Loaders

def array_loaders(policy='none', augment='batch', workers=0):
    rng = np.random.default_rng(0)
    sets = [(rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8), np.arange(n) % 4) for n in (29, 11)]
    return array_dls(memory_data(*sets), range(29, 40), bs=8, num_workers=workers, device='cpu', policy=policy, augment=augment)


def loader_case(name, dls, model=None, **kwargs):
    for workers in 0, 2: cases[f'{name}_{workers}'] = lambda w=workers: train(lambda: dls(workers=w), model, **{**dict(metrics=accuracy), **kwargs})


loader_case('array_batch', partial(array_loaders, 'reference', 'batch'))
loader_case('array_item', partial(array_loaders, 'reference', 'item'))


def picture_loaders(workers):
    "fastai's own block of images, with a random crop of each item"
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, PILImage, RandomResizedCrop, RandomSplitter
    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    block = DataBlock((ImageBlock, CategoryBlock(vocab=[*'abcd'])), get_items=lambda _: range(40), get_x=lambda i: PILImage.create(x[i]),
                      get_y=lambda i: 'abcd'[i % 4], splitter=lambda o: [[*range(29)], [*range(29, 40)]], item_tfms=RandomResizedCrop(12))
    return block.dataloaders(None, bs=8, num_workers=workers, device='cpu', drop_last=False)


loader_case('pictures', picture_loaders)


def weighted_loaders(workers):
    x, y = images(40)
    dsets = Datasets(tls=[TfmdLists(list(o), None, splits=[range(29), range(29, 40)]) for o in (x, y)], n_inp=1)
    dls = dsets.weighted_dataloaders(np.arange(1, 30), bs=8, num_workers=workers, device=torch.device('cpu'), drop_last=False)
    dls.c = 4
    return dls


loader_case('weighted', weighted_loaders)


def table_loaders(workers):
    import pandas as pd
    from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularPandas
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=40), b=[*'xyz']*13 + ['x'], y=[*'pq']*20))
    return TabularPandas(df, [Categorify, Normalize], ['b'], ['a'], 'y', CategoryBlock, splits=[[*range(29)], [*range(29, 40)]]).dataloaders(
        bs=8, num_workers=workers, device='cpu', drop_last=False)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(4, 3), nn.Linear(4, 2)
    def forward(self, cat, cont): return self.out(torch.cat([self.emb(cat[:, 0]), cont], 1))


loader_case('table', table_loaders, Table)


def language_loaders(workers):
    from fastai.text.data import LMDataLoader, LMTensorText
    rng = np.random.default_rng(0)
    dls = [LMDataLoader([LMTensorText(rng.integers(0, 8, n)) for n in sizes], bs=6, seq_len=5, num_workers=workers, device=torch.device('cpu'), shuffle=i == 0)
           for i, sizes in enumerate([(101, 57, 60), (40, 71)])]
    return DataLoaders(*dls)


class Language(nn.Module):
    "Keeps its state from batch to batch, as fastai's AWD-LSTM"
    def __init__(self):
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(8, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 8)
        self.reset()
    def reset(self): self.hidden = None
    def forward(self, x):
        h, self.hidden = self.rnn(self.emb(x), self.hidden)
        self.hidden = self.hidden.detach()
        return self.out(h)


class Reset(Callback):
    def before_train(self): self.learn.model.reset()
    def before_validate(self): self.learn.model.reset()


loader_case('language', language_loaders, Language, cbs=[Reset()], metrics=[accuracy, Perplexity()])


def text_loaders(workers, equal=True):
    from fastai.text.data import SortedDL, TensorText, pad_input_chunk
    rng = np.random.default_rng(0)
    items = [(TensorText(rng.integers(2, 9, 7 if equal else rng.integers(3, 12))), torch.tensor(i % 2)) for i in range(40)]
    dls = [SortedDL(items[a:b], bs=8, num_workers=workers, device=torch.device('cpu'), shuffle=not a, drop_last=False, sort_func=lambda o: len(o[0]),
                    before_batch=partial(pad_input_chunk, pad_idx=1, seq_len=4), n_inp=1) for a, b in ((0, 29), (29, 40))]
    return DataLoaders(*dls)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(10, 6, padding_idx=1), nn.Linear(6, 2)
    def forward(self, x): return self.out(self.emb(x).sum(1)/(x != 1).sum(1, keepdim=True))


loader_case('texts', text_loaders, Text)
loader_case('texts_uneven', partial(text_loaders, equal=False), Text)


# Scripts

def in_block(learn):
    "What a script may do in the block, around its fits"
    rows = [learn.validate()]
    lrs = learn.lr_find(num_it=8, show_plot=False)
    rows.append(learn.validate())
    learn.fit(1, lrs.valley)
    learn.save('saved')
    rows.append(learn.validate())
    p, y = learn.get_preds()
    learn.fit(1)
    learn.load('saved')
    learn.fit(1)
    learn.export('exported.pkl')
    learn.rows = numbers(rows)
    learn.preds = torch.cat([o.double().flatten() for o in (p, y, torch.tensor([lrs.valley]))])


@case
def script():
    learn = train(around=in_block, metrics=[accuracy, MeanRecall()], path=folder/'script')
    rows = torch.cat([learn.rows, numbers([learn.validate()])])
    return dict(state(learn), rows=rows, preds=learn.preds, after=torch.cat([o.double().flatten() for o in learn.get_preds()]))


class Broken(Exception): pass


class At(Callback):
    "Does something after a batch; `plan` is what, epoch, batch and part, and no setting"
    order, plan = 2500, None
    def after_batch(self):
        if At.plan and not self.learn.lock.locked() and At.plan[1:] == (self.epoch, self.iter, 'train' if self.training else 'valid'): At.plan[0]()


def break_off(): raise Broken('off')
def stop_one():
    if this_rank() == n_ranks() - 1: os.kill(os.getpid(), signal.SIGTERM)


class Crossed(nn.Module):
    "Its layers come in another order than they are used, as the gradients of torch's buckets do; the last one is not used at all"
    def __init__(self):
        super().__init__()
        self.head, self.body, self.spare = nn.Linear(8, 4), nn.Sequential(*[*net(nn.BatchNorm2d(8), drop=0.5)][:-1]), nn.Linear(8, 8)

    def forward(self, x): return self.head(self.body(x))


def run_dir(name): return folder/name if this_rank() == 0 else folder/f'{name}_of_another'


def checkpointed(name, *plan, epochs=3):
    "A fit with all that is drawn, that goes on where it was broken off; what ended it, and its state"
    set_seed(1)
    dls = array_loaders('reference', 'batch')
    torch.manual_seed(2)
    learn = quiet(Learner(dls, Crossed(), lr=0.05, opt_func=FastSGD, metrics=[accuracy, MeanRecall()], loss_func=CrossEntropyLossFlat()))
    learn.remove_cb(learn.recorder)
    learn.add_cbs([EpochRecorder(), EMA(0.2), RunLog(run_dir(name)), Checkpoint(run_dir(name), every=2), At()])
    At.plan = plan
    if n_ranks() == 1:
        for dl in dls.loaders: make_keyed(dl)
    how = ''
    with learn.distributed():
        try: learn.fit(epochs)
        except (Broken, Stopped) as e: how = f'{type(e).__name__} {e}'
    assert all(dl.share is None for dl in dls.loaders)
    return how, state(learn)


def resumed(name, *plans):
    "A fit that `plans` break off, one after the other, and its end"
    hows = [checkpointed(name, *plan)[0] for plan in plans]
    how, end = checkpointed(name)
    (folder/f'{name}.{this_rank()}.txt').write_text('\n'.join([*hows, how]))
    return end


@case
def run_whole(): return resumed('whole')
@case
def run_broken(): return resumed('broken', (break_off, 0, 2, 'train'), (break_off, 1, 2, 'train'), (break_off, 1, 1, 'valid'), (break_off, 2, 3, 'train'))
@case
def run_stopped(): return resumed('stopped', (stop_one, 0, 1, 'train'), (stop_one, 0, 1, 'valid'), (stop_one, 1, 0, 'valid'), (stop_one, 2, 2, 'train'))


def damage():
    if this_rank() == 0: max((folder/'damaged'/'checkpoints').glob('*.safetensors'), key=lambda p: p.stat().st_mtime_ns).write_bytes(b'nothing')
    if n_ranks() > 1: dist.barrier()
    break_off()


@case
def run_damaged(): return resumed('damaged', (damage, 1, 2, 'train'))
@case
def run_left():
    "Broken off in the middle of an epoch, for another number of processes"
    return checkpointed('left', break_off, 1, 2, 'train')[1]
@case
def run_taken_up(): return checkpointed('left')[1]


# Processes that are gone

def lose(how):
    watch.BEAT, watch.SILENT, watch.LOST = 0.2, 2, 4
    def leave():
        if this_rank() == 0: return
        if how == 'raise': raise Broken('no more')
        os.kill(os.getpid(), dict(kill=signal.SIGKILL, stop=signal.SIGSTOP)[how])
    At.plan = leave, 0, 1, 'train'
    learn = quiet(Learner(array_loaders(), net(), lr=0.05, loss_func=CrossEntropyLossFlat(), cbs=At()))
    try:
        with learn.distributed(command='start again'): learn.fit(100)
    except watch.RankLost as e: print('RankLost', e, flush=True)


def main(names):
    if names[0] == 'lose': return lose(names[1])
    with process_group():
        for name in names:
            if name == 'script': continue
            write_tensors(folder/f'{name}.{this_rank()}.safetensors', out(cases[name]()))
            if n_ranks() > 1: dist.barrier()
    if 'script' in names: write_tensors(folder/f'script.{this_rank()}.safetensors', cases['script']())  # with a process group of its own


def out(o): return o if isinstance(o, dict) else state(o)


if __name__ == '__main__':
    multiprocessing.set_start_method('fork', force=True)  # of the workers
    folder = Path(sys.argv[1])
    main(sys.argv[2:] or [*cases])
