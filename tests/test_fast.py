"The fast layers against the plain ones, the number format, the optimizer, and Learners that use them"
import copy
import inspect
import platform
import subprocess
import sys
import warnings
from collections import OrderedDict, namedtuple
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import params, set_seed
from fastcore.basics import noop
from torch import nn

from s9_fastai.training.fast import Autocast, ChannelsLast2d, FastSGD, _is_intel, keep_freed_memory, autocast_dtype
from s9_fastai.training.layers import FastBatchNorm2d, FastDropout, FoldedBatchNorm, fast_layers, fold_rows
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.nets.net import Net
from s9_fastai.test_utils import synth_dls, synth_groups, synth_learner

cl = torch.channels_last
shapes = [(128, 19, 32, 32), (7, 38, 15, 15), (3, 5, 11, 4), (2, 3, 1, 9), (4, 1, 6, 1), (16, 64, 8, 8)]


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).contiguous(memory_format=cl)


# --- batch norm

def folded(x, g, weight, bias):
    "Output, gradients and statistics of `FoldedBatchNorm`"
    ins = [o.clone().requires_grad_() for o in (x, weight, bias)]
    y, mean, var = FoldedBatchNorm.apply(*ins, 1e-5)
    y.backward(g)
    return [y.detach(), *(o.grad for o in ins), mean, var]


def plain(x, g, weight, bias):
    "The same by the definition, in float64"
    ins = [o.double().clone().requires_grad_() for o in (x, weight, bias)]
    x, weight, bias = ins
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    y = (x - mean[:, None, None])/(var[:, None, None] + 1e-5).sqrt()*weight[:, None, None] + bias[:, None, None]
    y.backward(g.double())
    return [y.detach(), *(o.grad for o in ins), mean.detach(), var.detach()]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', shapes, ids=str)
def test_folded_batch_norm_is_batch_norm(shape, dtype):
    x, g = 2*rand(*shape, dtype=dtype) + 0.7, rand(*shape, dtype=dtype, seed=1)
    weight, bias = rand(1, shape[1], 1, 1, seed=2).flatten(), rand(1, shape[1], 1, 1, seed=3).flatten()
    for got, want in zip(folded(x, g, weight, bias), plain(x, g, weight, bias)):
        assert got.shape == want.shape
        tol = 2e-5 if got.dtype == torch.float32 and dtype == torch.float32 else 2e-2 if got.dtype == dtype else 1e-3
        assert (got - want).abs().max() <= tol*want.abs().max()


def test_fold_is_a_view_of_rows():
    x = rand(2, 3, 4, 5)
    r = fold_rows(x)
    assert r.shape == (2, 15, 4, 1) and r.data_ptr() == x.data_ptr() and r.is_contiguous(memory_format=cl)
    assert all(r[b, w*3 + c, h, 0] == x[b, c, h, w] for b in range(2) for c in range(3) for h in range(4) for w in range(5))


def test_running_statistics_are_those_of_torch():
    a, b = nn.BatchNorm2d(19, momentum=0.3), FastBatchNorm2d(19, momentum=0.3)
    for i in range(3):
        x = rand(16, 19, 32, 32, seed=i) + i
        a(x), b(x)
    torch.testing.assert_close(a.running_mean, b.running_mean)
    torch.testing.assert_close(a.running_var, b.running_var)
    assert a.num_batches_tracked == b.num_batches_tracked == 3


@pytest.mark.parametrize('kw', [dict(momentum=None), dict(affine=False), dict(track_running_stats=False)], ids=str)
def test_other_options_are_left_to_torch(kw):
    a, b, x = nn.BatchNorm2d(19, **kw), FastBatchNorm2d(19, **kw), rand(16, 19, 32, 32)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize('x', [rand(8, 19, 32, 32).contiguous(), rand(8, 19, 9, 9)], ids=['not channels_last', 'small'])
def test_where_it_does_not_pay_it_is_torchs_own_to_the_bit(x):
    a, b = nn.BatchNorm2d(19), FastBatchNorm2d(19)
    assert torch.equal(a(x), b(x)) and torch.equal(a.running_var, b.running_var)


def test_evaluation_is_torchs_own_to_the_bit():
    x = rand(16, 19, 32, 32)
    assert torch.equal(nn.BatchNorm2d(19).eval()(x), FastBatchNorm2d(19).eval()(x))


def test_batch_norm_of_a_frozen_layer_and_of_a_slice():
    bn, x = FastBatchNorm2d(19), rand(32, 19, 32, 32).requires_grad_()
    bn.requires_grad_(False)
    bn(x).sum().backward()
    assert bn.weight.grad is None and x.grad is not None
    g = rand(32, 38, 32, 32)[:, :19]  # a gradient that is no channels_last of its own
    a, b = (torch.autograd.grad(m(x), x, g)[0] for m in (FastBatchNorm2d(19), nn.BatchNorm2d(19)))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_value_that_is_not_finite_shows():
    x = rand(16, 19, 32, 32)
    x[0, 0, 0, 0] = float('nan')
    y = FastBatchNorm2d(19)(x)
    assert y[:, 0].isnan().all() and y[:, 1:].isfinite().all()


def test_one_value_a_channel_is_an_error():
    with pytest.raises(ValueError, match='more than 1 value per channel'): FastBatchNorm2d(3)(torch.zeros(1, 3, 1, 1))


# --- dropout

@pytest.mark.parametrize('p', [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize('x', [torch.ones(64, 38, 15, 15).contiguous(memory_format=cl), torch.ones(64, 8550), torch.ones(547_201)],
                         ids=['channels_last', 'matrix', 'odd length'])
def test_dropout_drops_p_and_scales_the_rest(x, p):
    torch.manual_seed(0)
    y = FastDropout(p)(x)
    n = x.numel()
    assert abs((y == 0).sum().item() - p*n) < 4*(n*p*(1 - p))**0.5
    np.testing.assert_allclose(y.unique().tolist(), [0, 1/(1 - p)], rtol=2e-3 if p == 0.9 else 2e-4)
    assert y.shape == x.shape and y.stride() == x.stride()


def test_the_mean_is_kept_exactly():
    "What is left, times its scale, is 1 whatever the rounding of p to 1/65536, as near as the number format can say"
    for p, dtype in product((0.1, 1/3, 0.77), (torch.float32, torch.bfloat16)):
        scale, share = FastDropout(p)(torch.ones(1000, dtype=dtype)).max().item(), 1 - round(p*65536)/65536
        assert scale*share == pytest.approx(1, abs=torch.finfo(dtype).eps)


@pytest.mark.parametrize('p', [0., 1e-6, 1.])
def test_the_ends_are_torchs_own(p):
    x = rand(4, 3, 8, 8)
    torch.manual_seed(0)
    a = FastDropout(p)(x)
    torch.manual_seed(0)
    assert torch.equal(a, nn.Dropout(p)(x)) and torch.equal(FastDropout(p).eval()(x), x)


def test_gradient_goes_where_the_value_went():
    x = rand(8, 38, 15, 15).requires_grad_()
    y = FastDropout(0.3)(x)
    y.sum().backward()
    assert torch.equal(x.grad, (y/x).detach().nan_to_num()) or torch.allclose(x.grad, (y/x).detach(), atol=1e-5)
    assert set((x.grad == 0).unique().tolist()) == {False, True}


def test_masks_follow_torchs_generator():
    drop, x = FastDropout(0.5), torch.ones(100_000)
    torch.manual_seed(1)
    a, state = drop(x), torch.get_rng_state()
    b = drop(x)
    torch.set_rng_state(state)
    assert torch.equal(drop(x), b) and abs((a == b).float().mean().item() - 0.5) < 0.01


def test_in_place_is_left_to_torch():
    x = torch.ones(100_000)
    y = FastDropout(0.5, inplace=True)(x)
    assert y is x and (x == 0).any()


def test_a_tensor_with_gaps():
    x = torch.ones(64, 38, 15, 15)[:, ::2, 1:-1]
    y = FastDropout(0.5)(x)
    assert y.shape == x.shape and abs((y == 0).float().mean().item() - 0.5) < 0.02


# --- swapping the layers

def test_fast_layers_keep_all_but_the_class():
    net, seen = Net(), []
    net.conv1.norm.register_forward_hook(lambda *_: seen.append(1))
    ids, keys = [id(p) for p in net.parameters()], list(net.state_dict())
    assert fast_layers(net) is net and [id(p) for p in net.parameters()] == ids and list(net.state_dict()) == keys
    net(torch.zeros(2, 3, 32, 32))
    assert seen == [1] and type(net.conv5.norm) is FastBatchNorm2d and type(net.conv5.drop) is FastDropout
    assert not [m for m in net.modules() if type(m) in (nn.BatchNorm2d, nn.Dropout)]


def test_layers_of_other_types_stay():
    class Mine(nn.BatchNorm2d): pass
    model = nn.Sequential(Mine(3), nn.BatchNorm1d(3), nn.Dropout2d(0.1), nn.GroupNorm(1, 3))
    kinds = [type(m) for m in model]
    assert [type(m) for m in fast_layers(model)] == kinds


def test_fast_and_plain_nets_have_the_same_gradients():
    "In float64, where rounding cannot turn a ReLU"
    torch.manual_seed(0)
    a = Net(dropout=0.).double()
    b = fast_layers(copy.deepcopy(a).to(memory_format=cl))
    x, y = rand(64, 3, 32, 32).double(), torch.arange(64) % 10
    for net in (a, b): nn.functional.cross_entropy(net(x.contiguous() if net is a else x), y).backward()
    for (nm, p), q in zip(a.named_parameters(), b.parameters()):
        assert (p.grad - q.grad).abs().max() <= 1e-9*p.grad.abs().max(), nm


# --- the number format

def test_the_processor_is_asked(monkeypatch):
    monkeypatch.setattr('platform.machine', lambda: 'arm64')
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)  # as in builds for macOS
    assert autocast_dtype(torch.device('cpu')) == torch.float32
    monkeypatch.setattr('platform.machine', lambda: 'x86_64')
    for cpu, avx512, amx, fast in (('AMD EPYC', True, False, True), ('AMD EPYC', False, False, False), ('Intel(R) Xeon(R) Processor', True, False, False),
                                   ('Intel(R) Xeon(R) Processor', True, True, True), ('Intel64 Family 6, GenuineIntel', True, False, False)):
        monkeypatch.setattr('s9_fastai.training.fast.cpu_name', lambda: cpu)
        _is_intel.cache_clear()
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
        assert autocast_dtype(torch.device('cpu')) == (torch.bfloat16 if fast else torch.float32)
    _is_intel.cache_clear()
    assert autocast_dtype(torch.device('meta')) == torch.float32


class Spy(Callback):
    "Keeps what the first block of the model gives, and whether autocast is on in the loss"
    def before_fit(self):
        self.seen, self.outside = [], []
        self.handle = self.model.conv1.register_forward_hook(lambda m, i, o: self.seen.append(o.dtype))
    def after_loss(self): self.outside.append(torch.is_autocast_enabled('cpu'))
    def after_fit(self): self.handle.remove()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_autocast_runs_the_model_and_nothing_else(dtype, monkeypatch):
    monkeypatch.setattr('s9_fastai.training.fast.autocast_dtype', lambda device: dtype)
    spy = Spy()
    learn = synth_learner(model=Net(), cbs=[Autocast(), spy], metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert set(spy.seen) == {dtype} and set(spy.outside) == {False}
    assert learn.get_preds()[0].dtype == torch.float32 and not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_the_model_leaves_no_autocast(error, monkeypatch):
    monkeypatch.setattr('s9_fastai.training.fast.autocast_dtype', lambda device: torch.bfloat16)
    learn = synth_learner(model=Net(), cbs=Autocast())
    def fail(*_): raise error()
    handle = learn.model.conv9.register_forward_hook(fail)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(error): learn.fit(1)
        assert not torch.is_autocast_enabled('cpu') and 'forward' not in vars(learn.model)
        handle.remove()
        learn.fit(1)
    assert learn.model(torch.zeros(2, 3, 32, 32)).dtype == torch.float32


def test_predictions_without_labels():
    learn = synth_learner(model=Net()).to_fast()
    dl = learn.dls.test_dl([learn.dls.valid_ds[0][0]])
    assert learn.get_preds(dl=dl)[0].shape == (1, 10) and not torch.is_autocast_enabled('cpu')


class Odd(nn.Module):
    "Two inputs, one by keyword, and an output that is not a tensor"
    def __init__(self, kind):
        super().__init__()
        self.kind, self.lin = kind, nn.Linear(4, 3)

    def forward(self, x, scale=1.):
        y = self.lin(x)*scale
        return self.kind(logits=y, rest=[y, x.double(), 'text']) if self.kind else y


@pytest.mark.parametrize('kind', [None, dict, OrderedDict, namedtuple('Out', 'logits rest')], ids=str)
def test_any_inputs_and_outputs_go_through_autocast(kind, monkeypatch):
    monkeypatch.setattr('s9_fastai.training.fast.autocast_dtype', lambda device: torch.bfloat16)
    model, cb = Odd(kind), Autocast()
    cb.learn = learn = SimpleNamespace(model=model)
    cb.before_batch()
    out = learn.pred = model(torch.ones(2, 4), scale=2.)
    was = (out['logits'] if isinstance(out, dict) else out if kind is None else out.logits).dtype
    cb.after_pred()
    logits = learn.pred if kind is None else learn.pred['logits'] if isinstance(out, dict) else learn.pred.logits
    assert (was, logits.dtype, type(learn.pred)) == (torch.bfloat16, torch.float32, type(out)) and 'forward' not in vars(model)
    if kind is not None:
        rest = (learn.pred['rest'] if isinstance(out, dict) else learn.pred.rest)
        assert [rest[0].dtype, rest[1].dtype, rest[2]] == [torch.float32, torch.float64, 'text']


def test_a_cancelled_batch_leaves_no_autocast(monkeypatch):
    monkeypatch.setattr('s9_fastai.training.fast.autocast_dtype', lambda device: torch.bfloat16)
    class Cancel(Callback):
        order = 11
        def before_batch(self): raise CancelBatchException
    learn = synth_learner(model=Net(), cbs=[Autocast(), Cancel()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert 'forward' not in vars(learn.model)


@pytest.mark.parametrize('wrap', [torch.jit.script, partial(torch.compile, backend='eager'), torch.fx.symbolic_trace, nn.DataParallel],
                         ids=['script', 'compile', 'fx', 'parallel'])
def test_models_of_other_kinds_train(wrap, monkeypatch):
    monkeypatch.setattr('s9_fastai.training.fast.autocast_dtype', lambda device: torch.bfloat16)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    learn = synth_learner(model=wrap(model)).to_fast()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][0])


# --- memory

def test_freed_memory_is_kept_where_the_allocator_is_glibcs(monkeypatch):
    assert keep_freed_memory() == (platform.libc_ver()[0] == 'glibc')
    monkeypatch.setattr('sys.platform', 'darwin')
    assert keep_freed_memory() is False


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='page faults are counted for glibc alone')
def test_a_step_takes_no_new_pages():
    code = '''import resource, torch
from s9_fastai.training.fast import keep_freed_memory
from s9_fastai.training.layers import fast_layers
from s9_fastai.nets.net import Net
keep_freed_memory()
net, x = fast_layers(Net()).to(memory_format=torch.channels_last), torch.randn(64, 3, 32, 32)
faults = []
for i in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    net(x).sum().backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, capture_output=True, text=True).stdout
    assert int(out) < 500  # thousands in every step without it; a busy machine takes pages away, but not in each step


# --- the optimizer

def trained(opt_func, mom=0.9, freeze=False, **kwargs):
    learn = synth_learner(opt_func=partial(opt_func, mom=mom), splitter=synth_groups, seed=3, **kwargs)
    if freeze: learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, slice(0.01, 0.1))
        learn.unfreeze()
        learn.fit(1, 0.05)
    return learn


@pytest.mark.parametrize('kw', [{}, dict(wd=0.1), dict(wd=0.1, wd_bn_bias=True), dict(freeze=True), dict(mom=0.)], ids=str)
def test_fast_sgd_is_fastais_to_the_bit(kw):
    a, b = trained(SGD, **kw), trained(FastSGD, **kw)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    if kw.get('mom', 0.9): assert torch.equal(a.opt.state_dict()['state'][0]['grad_avg'], b.opt.state_dict()['state'][0]['grad_avg'])


@pytest.mark.parametrize('opt_func', [SGD, FastSGD], ids=["fastai's", 'FastSGD'])
def test_its_state_is_saved_and_loaded(tmp_path, opt_func):
    "The second half of a training, from the file of the first, also from one that fastai's SGD wrote"
    first, second = synth_dls(seed=1), synth_dls(seed=2)
    learn = synth_learner(first, opt_func=partial(opt_func, mom=0.9), path=tmp_path)
    again = synth_learner(second, opt_func=partial(FastSGD, mom=0.9), path=tmp_path, seed=9)
    for o in (learn, again): o.remove_cb(ProgressCallback), setattr(o, 'logger', noop)
    learn.fit(1)
    learn.save('half', with_opt=True)
    learn.dls = synth_dls(seed=2)
    learn.fit(1)
    again.load('half', with_opt=True)
    again.fit(1)
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), learn.model.parameters()))


def test_batch_norm_in_frozen_groups_is_trained_as_by_fastai():
    def weights(opt_func):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        learn = synth_learner(synth_dls(seed=1), model, opt_func=partial(opt_func, mom=0.9), splitter=lambda m: [params(m[:2]), params(m[2:])], wd=0.1)
        learn.freeze()
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return model.state_dict()
    a, b = weights(SGD), weights(FastSGD)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(b['1.weight'], torch.ones(4))


def test_a_closure_is_refused():
    with pytest.raises(NotImplementedError, match='takes no closure'): FastSGD([torch.zeros(1)], lr=0.1).step(lambda: 0)


def test_a_parameter_without_a_gradient_stays():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = FastSGD([a, b], lr=0.1, wd=0.5)
    a.sum().backward()
    opt.step()
    assert torch.equal(b, torch.ones(2)) and not torch.equal(a, torch.ones(2))
    opt.zero_grad()
    assert a.grad is None


# --- Learners

def test_the_recipe_chooses():
    dls = synth_dls()
    fast, plain = (s9_learner(dls, get_recipe(compute=c)) for c in ('fast', 'plain'))
    assert type(fast.model.conv4.drop) is FastDropout and hasattr(fast, 'autocast') and hasattr(fast, 'channels_last')
    assert type(plain.model.conv4.drop) is nn.Dropout and not hasattr(plain, 'autocast') and not hasattr(plain, 'channels_last')


def test_it_learns():
    "640 synthetic images; how like the plain way it learns on CIFAR-10 is in benchmarks/results/equality.jsonl"
    set_seed(0)
    learn = s9_learner(synth_dls(640, bs=32), get_recipe(dropout=0.))
    with learn.no_bar(), learn.no_logging(): learn.fit(6)  # after 4 it depends on the CPU's bfloat16
    losses = [row[0] for row in learn.recorder.values]
    assert losses[-1] < 0.5*losses[0]


def test_the_same_seed_gives_the_same_weights():
    def weights():
        set_seed(4)
        learn = s9_learner(synth_dls(96), 'stated')
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return learn.model.state_dict()
    a, b = weights(), weights()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_export_and_load(tmp_path):
    learn = synth_learner(model=Net(), path=tmp_path, metrics=accuracy).to_fast()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    want = learn.get_preds()[0]
    learn.export('fast.pkl')
    with pytest.warns(UserWarning, match='pickle'): again = load_learner(tmp_path/'fast.pkl')
    with again.no_bar(): got = again.get_preds(dl=learn.dls.valid)[0]
    # fastai takes ChannelsLast out of what it loads for a CPU, and another kernel rounds its bfloat16 otherwise
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


def mixed():
    "Weights of three to five dimensions, a 1x1 convolution and a buffer without memory of its own"
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Conv2d(8, 8, 1), nn.Unflatten(1, (2, 4)),
                          nn.Conv3d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d((1, 1, 8)), nn.Flatten(2), nn.Conv1d(4, 10, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    model.register_buffer('wide', torch.ones(1, 1, 1, 1).expand(2, 3, 4, 4))
    return model


def layout(learn): return [(type(m), [o.stride() for o in [*m.parameters(False), *m.buffers(False)]]) for m in learn.model.modules() if m is not learn.model]


def test_to_plain_leaves_what_was_there(tmp_path):
    learn = synth_learner(model=mixed(), path=tmp_path)
    was = layout(learn)
    with learn.no_bar(), learn.no_logging():
        cbs = {*map(type, learn.cbs)}
        learn.to_fast().fit(1)
        assert layout(learn) != was and learn.model[4].weight.stride() == (8, 1, 8, 8)
        assert learn.to_plain() is learn and layout(learn) == was and {*map(type, learn.cbs)} == cbs
        learn.to_plain().fit(1)
    learn.export('plain.pkl')
    assert layout(learn) == was and b's9_fastai' not in (tmp_path/'plain.pkl').read_bytes()


def test_to_plain_keeps_what_was_channels_last_before():
    net = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Conv2d(10, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(memory_format=cl)
    learn = synth_learner(model=net, cbs=ChannelsLast())
    was = layout(learn)
    with learn.no_bar(), learn.no_logging(): learn.to_fast().fit(1)
    assert not learn._grab_cbs(ChannelsLast2d)
    learn.to_plain()
    assert layout(learn) == was and type(learn.channels_last) is ChannelsLast


def test_to_plain_after_an_interrupt(monkeypatch):
    monkeypatch.setattr('s9_fastai.training.fast.autocast_dtype', lambda device: torch.bfloat16)
    class Break(Callback):
        order = 11
        def before_batch(self): raise KeyboardInterrupt
    learn = synth_learner(model=mixed()).to_fast()
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Break())
    assert 'forward' in vars(learn.model) and 'forward' not in vars(learn.to_plain().model)


def fp16_then_fast(learn): learn.to_fp16().to_fast()
def given_then_fast(learn): learn.add_cb(MixedPrecision()).to_fast()
def native_then_fast(learn): learn.to_non_native_fp16().to_fast()
def fast_then(name): return lambda learn: getattr(learn.to_fast(), name)()
def fp16_in_fit(learn): learn.to_fast().fit(1, cbs=MixedPrecision())
def fp16_added(learn): learn.to_fast().add_cb(MixedPrecision()).fit(1)


@pytest.mark.parametrize('do, message, remedy', [
    (fp16_then_fast, 'has MixedPrecision, an autocast of its own: call to_fp32() before to_fast()', lambda o: o.to_fp32().to_fast()),
    (given_then_fast, 'call to_fp32() before to_fast()', lambda o: o.to_fp32().to_fast()),
    (native_then_fast, 'has NonNativeMixedPrecision, an autocast of its own: call to_non_native_fp32() before to_fast()', lambda o: o.to_non_native_fp32().to_fast()),
    (fast_then('to_fp16'), 'has Autocast: call to_plain() before to_fp16()', lambda o: o.to_plain().to_fp16()),
    (fast_then('to_bf16'), 'has Autocast: call to_plain() before to_bf16()', lambda o: o.to_plain().to_bf16()),
    (fast_then('to_non_native_fp16'), 'call to_plain() before to_non_native_fp16()', lambda o: o.to_plain()),
    (fp16_in_fit, 'leave out MixedPrecision, or call to_plain() first', lambda o: o),
    (fp16_in_fit, 'leave out MixedPrecision, or call to_plain() first', lambda o: o.to_plain().to_fp16()),
    (fp16_added, 'leave out MixedPrecision, or call to_plain() first', lambda o: o.to_plain())],
    ids=['fp16', 'callback', 'native', 'to_fp16', 'to_bf16', 'to_native', 'in fit', 'in fit, plain', 'added'])
def test_two_autocasts_are_refused_and_the_remedy_works(do, message, remedy):
    learn = synth_learner()
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError) as e: do(learn)
        assert message in str(e.value)
        remedy(learn).fit(1)
    assert np.isfinite(learn.recorder.values[-1][0])


def test_fastais_own_signature_stays():
    assert str(inspect.signature(Learner.to_fp16)).startswith('(self') and Learner.to_fp16.__doc__.startswith('Set `Learner` to float16')
    assert type(synth_learner().to_fp16(growth_interval=3).mixed_precision) is MixedPrecision


def test_a_lazy_model_and_a_summary():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10))
    learn = synth_learner(model=model).to_fast()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert 'FastBatchNorm2d' in str(learn.summary())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu():
    learn = s9_learner(synth_dls().cuda(), 'stated')
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert next(learn.model.parameters()).is_cuda and np.isfinite(learn.recorder.values[-1][0])


@pytest.mark.parametrize('first, then', [('to_plain', 'to_fast'), ('to_fast', 'to_plain')])
def test_no_gradient_of_the_former_layout_is_left(first, then):
    "torch warns of one, since each backward would copy it"
    learn = synth_learner(model=nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.filterwarnings('error', message='grad and param do not obey the gradient layout contract')
        for how in (first, then):
            getattr(learn, how)()
            learn.fit(1)
    assert learn.model[0].weight.grad.stride() == learn.model[0].weight.stride()
