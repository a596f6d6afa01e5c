"""Each part of training with networks of torchvision, timm and fastai as they are: it does its work there, and a fit that stops in an epoch resumes to
the bit. And such networks by name: built, pretrained, in a recipe, in a weights file"""
import builtins
import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.block import CategoryBlock
from fastai.data.transforms import IndexSplitter, range_of
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.all import Categorify, TabularPandas, tabular_learner
from fastai.tabular.core import Normalize as NormalizeColumns
from fastai.torch_core import TensorCategory, TensorImage, TensorMask, set_seed
from fastai.vision.learner import unet_learner
from torch import nn
from works_with_learners import narrow_resnet18

from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.app.results import finish
from s9_fastai.augment.keyed import KeyedDL
from s9_fastai.cifar.facts import SPEC
from s9_fastai.cifar.loaders import cifar_block
from s9_fastai.core.weights import save_weights
from s9_fastai.nets.build import build_net, find_arch
from s9_fastai.nets.pretrained import load_pretrained
from s9_fastai.nets.saved import load_net
from s9_fastai.report.summary import summary
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.test_utils import quiet, synth_cifar
from s9_fastai.training.distill import Distill, TeacherLogits
from s9_fastai.training.ema import EMA
from s9_fastai.training.fast import Autocast, FastSGD
from s9_fastai.training.freeze import FreezeBody, body_head
from s9_fastai.training.layers import FastBatchNorm2d
from s9_fastai.training.muon import FastMuon, hidden_matrices
from s9_fastai.training.schedule import StepLR

pytest.importorskip('timm')
n, n_valid, bs, size, n_classes = 8, 4, 4, 64, 3


class Images:
    "Images of noise with classes, or with masks; each is the same each time"
    n_inp = 1
    def __init__(self, items, masks=False): self.items, self.masks = list(items), masks
    def __len__(self): return len(self.items)

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(self.items[i])
        x, mask = torch.randn(3, size, size, generator=g), torch.randint(2, (size, size), generator=g)
        return TensorImage(x), TensorMask(mask) if self.masks else TensorCategory(self.items[i] % n_classes)


def image_dls(masks=False):
    sets = Images(range(n), masks), Images(range(100, 100 + n_valid), masks)
    dls = DataLoaders(*[KeyedDL(o, bs=bs, shuffle=i == 0, num_workers=0, seed=1, device='cpu') for i, o in enumerate(sets)])
    dls.c = 2 if masks else n_classes
    return dls


def of(arch, **kwargs): return Learner(image_dls(), build_net(arch, n_classes, size=size), loss_func=CrossEntropyLossFlat(), **kwargs)


def unet(**kwargs):
    dls = image_dls(masks=True)
    return unet_learner(dls, narrow_resnet18, n_out=2, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(axis=1), **kwargs)


def tabular(**kwargs):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.choice(['x', 'y'], n + n_valid), b=rng.normal(size=n + n_valid), y=[str(i % n_classes) for i in range(n + n_valid)]))
    to = TabularPandas(df, [Categorify, NormalizeColumns], ['a'], ['b'], 'y', y_block=CategoryBlock(), splits=IndexSplitter(range(n, n + n_valid))(range_of(df)))
    return tabular_learner(to.dataloaders(bs=bs, device='cpu'), layers=[16, 8], **kwargs)


#: What makes a Learner of it, and layers with the pixels that they see, by hand
NETWORKS = {
    'resnet18': (partial(of, 'resnet18'), {'conv1': 7, 'layer1.0.conv1': 19}),
    'convnext_atto': (partial(of, 'convnext_atto'), {'stem.0': 4, 'stages.0.blocks.0.conv_dw': 28}),
    'efficientnet_lite0': (partial(of, 'timm/efficientnet_lite0'), {'conv_stem': 3, 'blocks.0.0.conv_dw': 7}),
    'vit_tiny': (partial(of, 'vit_tiny_patch16_224'), {'patch_embed.proj': 16, 'blocks.0.mlp.fc1': 64}),
    'unet': (unet, {'layers.0.0': 7}),
    'tabular': (tabular, {})}
names = pytest.mark.parametrize('name', NETWORKS)


def make(name, opt_func=partial(FastSGD, mom=0.9), lr=0.01, **kwargs):
    set_seed(0, reproducible=False)
    learn = NETWORKS[name][0](opt_func=opt_func, lr=lr, **kwargs)
    learn.unfreeze()  # fastai's own functions freeze a part
    return quiet(learn)


def split(name): return {} if name == 'unet' else dict(splitter=body_head)  # a U-net has its own, of fastai


def trained(learn, epochs=1, lr=None, cbs=()):
    learn.fit(epochs, lr, cbs=list(cbs))
    assert all(math.isfinite(v) for row in learn.recorder.values for v in row)
    return learn


def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]


class Seen(Callback):
    "Keeps what `look` sees at `event`"
    order = 15  # after the step of the optimizer, before `EMA`
    def __init__(self, event, look):
        self.look, self.seen = look, []
        setattr(self, event, lambda: self.seen.append(self.look(self.learn)))


@names
def test_to_fast(name):
    learn = make(name).to_fast()
    norms = [m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]
    trained(learn)
    assert learn._grab_cbs(Autocast) and all(isinstance(m, FastBatchNorm2d) for m in norms if type(m).__module__.startswith(('torch.', 's9_')))
    images = [p for p in learn.model.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in images) and len(images) > 0 or name == 'tabular'
    assert not any(isinstance(m, FastBatchNorm2d) for m in learn.to_plain().model.modules())


def largest(m):
    "The largest singular value of the matrix `m`, by the power method"
    v = torch.ones(m.shape[1])
    for _ in range(30): v = torch.nn.functional.normalize(m.T @ (m @ v), dim=0)
    return (m @ v).norm()


@names
def test_muon_moves_hidden_matrices_by_steps_of_equal_size(name):
    "The singular values of a first step are near 1, times the rate and the scale; first and last weight go along the gradient"
    lr, scale = 0.1, 0.01
    learn = make(name, opt_func=partial(FastMuon, scale=scale), wd=0.)
    before = Seen('before_step', lambda learn: [(p.detach().clone(), p.grad) for p in learn.model.parameters()])
    after = Seen('after_step', weights)
    trained(learn, lr=lr, cbs=[before, after])
    hidden = {id(p) for p in hidden_matrices([p for g in learn.opt.param_lists for p in g])}
    assert len(hidden) >= (1 if name == 'tabular' else 15)
    for q, (p, grad), new in zip(learn.model.parameters(), before.seen[0], after.seen[0]):
        if grad is None: continue
        if id(q) not in hidden: torch.testing.assert_close(new, p - lr*1.9*grad, atol=1e-4, rtol=1e-3)
        elif grad.abs().max() > 1e-6:
            m = (p - new)/lr
            assert 0.5 < largest(m.flatten(1))/(scale*max(len(m), m.numel()//len(m))**0.5) < 1.3


@names
def test_ema(name):
    learn, steps = make(name), Seen('after_step', weights)
    trained(learn, 2, cbs=[EMA(0.5), steps])
    for got, *each in zip(weights(learn), *steps.seen): torch.testing.assert_close(got, torch.stack(each).mean(0), atol=1e-4, rtol=1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(weights(learn), steps.seen[-1]))


@names
def test_step_lr(name):
    learn, seen = make(name, **split(name)), Seen('before_step', lambda learn: [h['lr'] for h in learn.opt.hypers])
    trained(learn, 2, slice(1e-4, 1e-2), cbs=[StepLR(step_size=1, gamma=0.1), seen])
    assert np.allclose(seen.seen, [[1e-4, 1e-2]]*2 + [[1e-5, 1e-3]]*2)


@names
def test_distillation(name):
    "Logits of a teacher change the training; masks and tables have none"
    cbs = [Distill(TeacherLogits(torch.randn(n, n_classes)), 0.5)]
    if name in ('unet', 'tabular'):
        with pytest.raises(TypeError, match='leave Distill out|use the loaders of cifar_dls'): trained(make(name), cbs=cbs)
    else: assert not all(map(torch.equal, weights(trained(make(name), cbs=cbs)), weights(trained(make(name)))))


@names
def test_fine_tuning(name):
    "The body is frozen in the first epoch and learns in the second"
    learn = make(name, **split(name))
    body, grads = [*learn.splitter(learn.model)[0]], Seen('before_step', lambda learn: [p.grad is not None for p in body])
    start, ends = [p.detach().clone() for p in body], Seen('after_train', lambda learn: [p.detach().clone() for p in body])
    trained(learn, 2, slice(1e-3, 1e-2), cbs=[FreezeBody(1), grads, ends])
    frozen = [not g for g in grads.seen[0]]
    assert any(frozen) and all(torch.equal(a, b) for a, b, is_frozen in zip(start, ends.seen[0], frozen) if is_frozen)
    assert sum(not torch.equal(a, b) for a, b in zip(start, ends.seen[1])) > len(body)/2


@names
def test_summary_and_receptive_field(name):
    learn = make(name)
    table = summary(learn)
    assert table.params == sum(p.numel() for p in learn.model.parameters()) and table.macs > 0
    fields = {r.name: r.field for r in table.rows}
    assert {k: fields[k][0] for k in NETWORKS[name][1]} == NETWORKS[name][1]


class Break(Callback):
    "Breaks a fit off after the first batch of its second epoch, if it is on"
    order, is_on = 2000, False
    def after_batch(self):
        if Break.is_on and self.training and (self.epoch, self.iter) == (1, 0): raise SystemError('broken off')


@names
def test_resume_is_equal_to_the_bit(name, tmp_path, monkeypatch):
    "Stopped in mid-epoch, after the body has joined in, with new objects"
    every = None if name == 'tabular' else 1  # a loader that is not keyed begins its epoch anew
    def fit(seed, *more):
        learn = make(name, **split(name))
        torch.manual_seed(seed)  # a new process has other random numbers
        return trained(learn, 2, slice(1e-3, 1e-2), cbs=[EMA(0.2), StepLR(step_size=1), FreezeBody(1), Break(), *more])
    def run(seed): return fit(seed, Checkpoint(tmp_path, every=every))
    whole = fit(0)
    monkeypatch.setattr(Break, 'is_on', True)
    with pytest.raises(SystemError): run(0)
    monkeypatch.setattr(Break, 'is_on', False)
    again = run(1)
    a, b = (o.model.state_dict() for o in (whole, again))
    assert [*a] == [*b] and all(torch.equal(a[k], b[k]) for k in a)
    assert [*whole.recorder.values] == [*again.recorder.values] and whole.recorder.losses == again.recorder.losses


# Networks by name

def cifar_like(): return cifar_block(synth_cifar(16, 8), 'none').dataloaders(range(24), bs=8, seed=0, num_workers=0, device='cpu')


def test_a_run_of_the_recipe_finetune(tmp_path, monkeypatch):
    "With a file of weights that is gone when the run resumes; and its network from the weights that it leaves"
    monkeypatch.setattr('s9_fastai.app.results.plot_misclassified', lambda *args, **kwargs: None)
    save_weights(build_net('resnet18', 1000), file := tmp_path/'resnet18.safetensors')
    recipe = replace(get_recipe('finetune', epochs=2), pretrained=str(file))
    def run(folder):
        set_seed(1, reproducible=False)
        learn = quiet(s9_learner(cifar_like(), recipe, folder and tmp_path/folder, folder and 1, cbs=Break()))
        learn.fit(2)
        return learn
    with pytest.warns(UserWarning, match='120 of 122 tensors are loaded; fc.weight, fc.bias stay as initialised'): whole = run(None)
    assert [h['lr'] for h in whole.opt.hypers][0] == pytest.approx([h['lr'] for h in whole.opt.hypers][1]/100)
    monkeypatch.setattr(Break, 'is_on', True)
    with pytest.raises(SystemError), pytest.warns(UserWarning, match='120 of 122'): run('broken')
    monkeypatch.setattr(Break, 'is_on', False)
    file.unlink()
    again = run('broken')
    assert all(map(torch.equal, whole.model.state_dict().values(), again.model.state_dict().values()))
    again.dls.source = type('Source', (), dict(spec=SPEC))
    finish(again, tmp_path/'broken')
    net, spec = load_net(tmp_path/'broken'/'weights.safetensors')
    assert spec == SPEC and all(map(torch.equal, net.state_dict().values(), again.model.state_dict().values()))


def test_names_without_timm(monkeypatch):
    "The error has the nearest names, and how to get timm's; torchvision's names work without it"
    real = builtins.__import__
    def no_timm(name, *args, **kwargs):
        if name == 'timm': raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', no_timm)
    assert find_arch('resnet18') == 'torchvision'
    for arch in ('convnext_atto', 'timm/resnet18'):
        with pytest.raises(ValueError, match=f"arch is '{arch}', but must be .*pip install timm"): build_net(arch)
    monkeypatch.undo()
    for arch in ('convnext_atto', 'timm/resnet18'): assert find_arch(arch) == 'timm'  # the remedy


@pytest.mark.parametrize('arch', ['net', 'resnet18', 'densenet121', 'mobilenet_v3_small', 'squeezenet1_1', 'swin_t', 'vit_b_32', 'xresnet18', 'xse_resnext18',
                                  'convnext_atto', 'efficientnet_b0', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'mixer_s32_224', 'timm/resnet18'])
def test_any_number_of_classes_and_channels(arch):
    net = build_net(arch, 5, n_in=4, size=64)
    out = net(torch.randn(2, 4, 64, 64))
    assert out.shape == (2, 5)
    out.sum().backward()
    assert sum(map(len, body_head(net))) == len([*net.parameters()])


def test_weights_of_one_network_in_another(tmp_path):
    "Other classes and channels: all but the head; another architecture: refused; a second network of the same kind: all"
    old = build_net('convnext_atto', 10)
    save_weights(old, path := tmp_path/'old.safetensors')
    with pytest.warns(UserWarning, match='old.safetensors: .* tensors are loaded; head.fc.weight, head.fc.bias stay as initialised'):
        new = load_pretrained(build_net('convnext_atto', 3, n_in=1), path)
    torch.testing.assert_close(new.stem[0].weight, old.stem[0].weight.sum(1, keepdim=True))
    grey = torch.randn(2, 1, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(new.eval().forward_features(grey), old.eval().forward_features(grey.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='none of its .* entries fits this network: give a file of the same architecture'): load_pretrained(build_net('resnet18'), path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same = load_pretrained(build_net('convnext_atto', 10), path)
    assert all(map(torch.equal, old.state_dict().values(), same.state_dict().values()))
