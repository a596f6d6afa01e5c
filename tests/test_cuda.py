"What only a GPU can show: no wait for it in the loop, CUDA graphs, bfloat16 without a scaler, resume and curves. Skipped without CUDA"
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn

from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.test_utils import quiet, synth_dls, synth_learner
from s9_fastai.training.fast import FastSGD, autocast_dtype
from s9_fastai.training.graphs import CudaGraphs
from s9_fastai.training.guards import FiniteLoss
from s9_fastai.training.record import EpochRecorder

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA on this machine: run tools/gpu_check.sh where there is a GPU')


def net(dropout=0.):
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def learner(*cbs, graphs=False, fast=False, device='cuda', n=72, bs=16, **kwargs):
    "A small Learner whose last training batch is partial"
    set_seed(0)
    learn = synth_learner(synth_dls(n, bs=bs, drop_last=False).to(torch.device(device)), net().to(device), opt_func=FastSGD, metrics=accuracy, cbs=cbs, **kwargs)
    learn.remove_cb(learn.recorder)
    learn.add_cbs([EpochRecorder(), FiniteLoss()])
    if fast: learn.to_fast()
    return quiet(learn.to_graphs() if graphs else learn)


def weights(learn): return torch.cat([p.detach().float().cpu().flatten() for p in learn.model.parameters()])
def values(learn): return [list(map(float, o)) for o in learn.recorder.values]


class NoWait(Callback):
    "An error for each wait for the device in the training part of an epoch, the first of a fit left out"
    order = -100  # before what is read at the end of the part

    def before_train(self):
        if self.epoch: torch.cuda.set_sync_debug_mode('error')
    def after_train(self): torch.cuda.set_sync_debug_mode('default')
    def after_fit(self): torch.cuda.set_sync_debug_mode('default')


@pytest.fixture(autouse=True)
def waits_again():
    yield
    if torch.cuda.is_available(): torch.cuda.set_sync_debug_mode('default')


class Stop(Callback):
    "Ends the process after the first epoch, once it is saved"
    order, not_saved = 2000, ('is_on',)
    def __init__(self, is_on): self.is_on = is_on
    def after_epoch(self):
        if self.is_on: raise KeyboardInterrupt


class OnDevice:
    "Batches that are there already, in the place of a loader"
    def __init__(self, dl): self.batches, self.bs, self.n, self.device = [*dl], dl.bs, dl.n, dl.device
    def __iter__(self): return iter(self.batches)
    def __len__(self): return len(self.batches)


# ---- what is checked on a CPU


def test_without_cuda_there_is_an_error_and_the_remedy_works():
    with pytest.raises(ValueError, match='to_graphs needs a CUDA device, but the loaders are on cpu: leave it out'): learner(device='cpu', graphs=True)
    learn = learner(CudaGraphs(), device='cpu')
    with pytest.raises(ValueError, match='CudaGraphs needs a CUDA device, but the model is on cpu: call learn.to_eager'): learn.fit(1)
    learn.to_eager().fit(1)


def test_losses_that_are_read_late_name_the_same_batch(monkeypatch):
    "As on a GPU: none is read before the end of the part"
    def message(every):
        learn = learner(device='cpu', lr=1e9)
        with pytest.raises(FloatingPointError) as e: learn.fit(3)
        return str(e.value).split('the loss is')[1]
    at_once = message(None)

    def later(self):
        self.losses.append((self.iter, self.learn.loss.detach(), self.opt.hypers[-1]['lr']))
        if len(self.losses) == self.every: self.check()
    monkeypatch.setattr(FiniteLoss, 'after_loss', later)
    assert message(200) == at_once
    monkeypatch.setattr(FiniteLoss, 'every', 2)
    assert message(2) == at_once


# ---- what needs a GPU


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize('graphs', [False, True])
def test_no_wait_in_the_loop(graphs):
    "The loop itself, with batches that lie on the device"
    learn = learner(NoWait(), fast=True, graphs=graphs)
    learn.dls.loaders[0] = OnDevice(learn.dls.train)
    learn.fit(3)
    assert np.isfinite(values(learn)).all() and len(learn.recorder.losses) == 15 and all(o.device.type == 'cpu' for o in learn.recorder.losses)


@needs_cuda
@pytest.mark.cuda
def test_no_wait_in_the_whole_of_a_recipe():
    "With the loader: images on the device, drawn and augmented there"
    learn = quiet(s9_learner(cifar_dls('sample', bs=128, augment='batch', device='cuda', seed=0), get_recipe('stated', augment='batch'), cbs=NoWait()))
    learn.fit(2)
    assert np.isfinite(values(learn)).all()


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize('fast', [False, True])
def test_graphs_train_as_eager_does(fast):
    "Weights move, and are those of the plain way but for rounding; the partial batch and the validation too"
    start, eager, graphs = (learner(fast=fast, graphs=g) for g in (False, False, True))
    for o in (eager, graphs): o.fit(3)
    assert (weights(graphs) - weights(start)).abs().max() > 1e-3, 'the weights do not move under graphs'
    assert graphs.cuda_graphs.graphed is not None and 'forward' not in vars(graphs.model)
    tol = 2e-2 if fast and autocast_dtype(torch.device('cuda')) == torch.bfloat16 else 1e-4
    assert torch.allclose(weights(graphs), weights(eager), atol=tol)
    assert np.allclose(values(graphs), values(eager), atol=5*tol)
    for a, b in zip(graphs.model.buffers(), eager.model.buffers()): assert torch.allclose(a.float(), b.float(), atol=tol*10)


@needs_cuda
@pytest.mark.cuda
def test_graphs_take_the_full_batches_only():
    seen = []
    class Look(Callback):
        order = CudaGraphs.order + 1
        def before_batch(self): seen.append((self.training, len(self.xb[0]), 'forward' in vars(self.model)))
    learner(Look(), graphs=True).fit(1)
    assert {(n, is_graph) for training, n, is_graph in seen if training} == {(16, True), (8, False)}
    assert not any(is_graph for training, _, is_graph in seen if not training)


@needs_cuda
@pytest.mark.cuda
def test_graphs_are_recorded_anew_when_layers_are_frozen():
    learn = learner(graphs=True)
    learn.fit(1)
    first = learn.cuda_graphs.graphed
    learn.model[0].requires_grad_(False)
    was = learn.model[0].weight.detach().clone()
    learn.fit(1, wd=0.)
    assert learn.cuda_graphs.graphed is not first and torch.equal(was, learn.model[0].weight)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize('cb', [MixedPrecision, GradientAccumulation])
def test_graphs_refuse_what_they_cannot_do_and_the_remedy_works(cb):
    learn = learner(graphs=True)
    with pytest.raises(ValueError, match=f'CudaGraphs does not work with {cb.__name__}: leave it out'): learn.fit(1, cbs=cb())
    learn.to_eager().fit(1, cbs=cb())


@needs_cuda
@pytest.mark.cuda
def test_dropout_draws_anew_in_a_graph():
    learn = learner(graphs=True)
    learn.model[3].p = 0.5
    seen = []
    class Keep(Callback):
        def after_pred(self):
            if self.training and len(self.pred) == 16: seen.append(self.pred.detach().clone())
    learn.dls.loaders[0] = OnDevice(learn.dls.train)
    learn.dls.train.batches = [learn.dls.train.batches[0]]*3
    learn.fit(1, lr=0., cbs=Keep())
    assert len(seen) == 3 and not torch.allclose(seen[1], seen[2])


@needs_cuda
@pytest.mark.cuda
def test_bfloat16_needs_no_scaler():
    if autocast_dtype(torch.device('cuda')) != torch.bfloat16: pytest.skip('this GPU has no bfloat16')
    learn = learner(fast=True)
    learn.fit(2)
    assert not learn._grab_cbs(MixedPrecision) and all(p.dtype == torch.float32 for p in learn.model.parameters()) and np.isfinite(values(learn)).all()


@needs_cuda
@pytest.mark.cuda
def test_a_nan_is_found_by_the_end_of_the_epoch():
    with pytest.raises(FloatingPointError, match='in training batch .* of epoch 1'): learner(lr=1e9).fit(1)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize('graphs', [False, True])
def test_a_resumed_run_is_equal(tmp_path, graphs, monkeypatch):
    "With deterministic kernels; a run that is stopped after its first epoch, and one that is not"
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    def run(folder, stop):
        set_seed(0)
        dls = cifar_dls('sample', bs=128, augment='batch', device='cuda', seed=0)
        learn = quiet(s9_learner(dls, get_recipe('stated', augment='batch', dropout=0.), run_dir=tmp_path/folder, cbs=Stop(stop)))
        if graphs: learn.to_graphs()
        learn.fit(3)
        return weights(learn)
    whole = run('whole', False)
    with pytest.raises(KeyboardInterrupt): run('parts', True)
    assert torch.equal(run('parts', False), whole)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize('graphs', [False, True])
def test_curves_are_those_of_a_cpu_within_noise(graphs):
    "The same batches and weights at the start: float32 apart by rounding alone in the first epochs"
    cpu, gpu = learner(device='cpu'), learner(graphs=graphs)
    gpu.model.load_state_dict(cpu.model.state_dict())
    for o in (cpu, gpu): o.fit(2)
    assert np.allclose(values(gpu), values(cpu), atol=0.05)


@needs_cuda
@pytest.mark.cuda
def test_images_on_the_device_are_the_batches_of_the_plain_way():
    "Order and labels equal, pixels but for rounding"
    def batches(device, on):
        dl = cifar_dls('sample', bs=128, augment='batch', device=device, seed=0).train
        dl.on_device = on
        return [(x.cpu(), y.cpu()) for x, y in dl]
    for (xa, ya), (xb, yb) in zip(batches('cpu', False), batches('cuda', True), strict=True):
        assert torch.equal(ya, yb) and (xa - xb).abs().mean() < 1e-3
