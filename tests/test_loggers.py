"fastai's callbacks for TensorBoard and Weights & Biases beside ours: the same weights, before and after a run is resumed. Both packages are stand-ins"
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

from s9_fastai.report.outputs import outputs_of
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.test_utils import quiet, synth_learner
from s9_fastai.training.record import EpochRecorder


class Killed(Callback):
    "Ends a fit as a signal would, in its second epoch"
    not_saved, order = True, 90
    def after_epoch(self):
        if self.epoch == 1: raise RuntimeError('killed')


class Writer:
    "Takes what a SummaryWriter takes"
    def __init__(self, log_dir=None): self.scalars = rows
    def add_scalar(self, name, value, step): self.scalars.append((name, step, float(value)))
    def close(self): pass


rows = []


def tensorboard(monkeypatch):
    module = ModuleType('torch.utils.tensorboard')
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, 'tensorboard', ModuleType('tensorboard'))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    return lambda: importlib.import_module('fastai.callback.tensorboard').TensorBoardCallback('logs', trace_model=False, log_preds=False)


def wandb(monkeypatch):
    module = ModuleType('wandb')
    module.run = SimpleNamespace(step=0, summary={})
    module.config = SimpleNamespace(update=lambda *args, **kwargs: None)
    module.log = lambda values, step=None: rows.extend((k, step, float(v)) for k, v in values.items() if v is not None)
    monkeypatch.setitem(sys.modules, 'wandb', module)
    found = importlib.import_module('fastai.callback.wandb')
    monkeypatch.setattr(found, '_format_config', lambda config: None)  # in fastai 2.8 it fails at whole numbers
    return lambda: found.WandbCallback(log_preds=False)


@pytest.fixture(params=[tensorboard, wandb], ids=['tensorboard', 'wandb'])
def logger(request, monkeypatch):
    rows.clear()
    yield request.param(monkeypatch)
    for nm in ('tensorboard', 'wandb'): sys.modules.pop(f'fastai.callback.{nm}', None)


def fit(*cbs):
    set_seed(0)
    learn = quiet(synth_learner(cbs=[EpochRecorder(), *cbs]))
    learn.fit(3)
    return learn


def same(a, b): return all(x.equal(y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_a_run_with_a_logger_is_the_run_without(tmp_path, logger):
    plain, logged = fit(), fit(logger(), Checkpoint(tmp_path/'run'))
    assert same(plain, logged) and logged.recorder.values == plain.recorder.values
    assert {'train_loss', 'valid_loss'} <= {nm for nm, *_ in rows}


def test_resumed_beside_a_logger(tmp_path, logger):
    whole = fit(logger())
    with pytest.raises(RuntimeError, match='killed'): fit(logger(), Checkpoint(tmp_path/'run'), Killed())
    assert same(whole, fit(logger(), Checkpoint(tmp_path/'run')))


def test_a_logger_may_come_or_go(tmp_path, logger):
    with pytest.raises(RuntimeError, match='killed'): fit(Checkpoint(tmp_path/'run'), Killed())
    assert same(fit(), fit(logger(), Checkpoint(tmp_path/'run')))


def test_outputs_beside_a_logger(tmp_path, logger):
    learn = fit(logger())
    n = len(rows)
    assert len(outputs_of(learn)) == 32 and len([o for o in rows[n:] if o[0] == 'train_loss']) == 0
    assert learn.recorder.values and torch.isfinite(learn.recorder.losses[-1])
