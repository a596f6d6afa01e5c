"The summary against independent counts (torch's flop counter, a gradient probe) and on awkward modules"
import copy

import pytest, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from s9_fastai.net import ConvBlock, Net, TransitionBlock
from s9_fastai.summary import Row, Summary, summary


def flops(model, size):
    "Twice the multiply-accumulates, as torch counts them"
    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter: model.eval()(torch.zeros(1, *size, device=device))
    return counter.get_total_flops()


def probe(model, names, size):
    "Extent, for each axis, of the input pixels on which the middle unit of each layer in `names` depends"
    model, kept, fields = copy.deepcopy(model).double().eval(), {}, {}
    for p in model.parameters(): nn.init.constant_(p, 1/p[0].numel())  # positive: ReLU stays open, no two paths cancel
    def keep(name): return lambda m, args, out: kept.update({name: out})
    for n in names: model.get_submodule(n).register_forward_hook(keep(n))
    x = torch.ones(1, *size, dtype=torch.float64, requires_grad=True)
    model(x)
    for n in names:
        out = kept[n][0].sum(0)
        g = torch.autograd.grad(out[tuple(s//2 for s in out.shape)], x, retain_graph=True)[0][0].sum(0)
        fields[n] = tuple(int(i.max() - i.min()) + 1 for i in g.nonzero().T)
    return fields


def fields(s): return {r.name: r.field for r in s.rows}


def test_net_fields_equal_the_gradient_probe_for_every_layer():
    got = fields(summary(Net(), (3, 32, 32)))
    names = [n for n in got if n not in ('gap', 'fc')]
    assert len(names) == 53
    blocks = [n for n, m in Net().named_children() if isinstance(m, (ConvBlock, TransitionBlock))]
    probed = probe(Net(), names + blocks, (3, 97, 97))
    assert {n: probed[n] for n in names} == {n: got[n] for n in names}
    for b in blocks: assert probed[b] == [f for n, f in got.items() if n.startswith(b + '.')][-1]
    assert got['fc'] == got['gap'] == (59, 59)


def test_net_fields_equal_the_product_rule_by_hand():
    "kernel, stride and dilation down the table; a 1x1 layer changes nothing"
    size, jump, want = 1, 1, []
    strides, dilations = [1, 1, 2] + [1]*9, [1, 1, 1, 1, 1, 2, 1, 1, 4, 1, 1, 1]
    for stride, dilation in zip(strides, dilations):
        size, jump = size + 2*dilation*jump, jump*stride
        want.append(size)
    got = fields(summary(Net()))
    assert [got[f'conv{i}.drop'][0] for i in range(1, 13)] == want == [3, 5, 7, 11, 15, 23, 27, 31, 47, 51, 55, 59]


@pytest.mark.parametrize('kw', [{}, dict(norm='gn'), dict(norm='ln', n_channels=40)])
def test_net_totals(kw):
    net = Net(**kw)
    s = summary(net, (3, 32, 32))
    assert s.params == s.trainable == sum(p.numel() for p in net.parameters()) == sum(r.params for r in s.rows)
    assert 2*s.macs == flops(net, (3, 32, 32))
    assert s.input_bytes == 4*3*32*32 and s.param_bytes == 4*s.params
    assert s.act_bytes == 2*4*sum(torch.Size(r.shape).numel() for r in s.rows)
    assert len(s.rows) == 55 and max(map(len, repr(s).splitlines())) <= 100


class Branches(nn.Module):
    "Residual, concatenation, padding, pools, rectangles and functional calls"
    def __init__(self, pool):
        super().__init__()
        self.a, self.pool = nn.Conv2d(3, 4, 7, 2, 3), pool(3, 2, padding=1)
        self.b, self.short = nn.Conv2d(4, 6, (3, 5), 2, (1, 2), groups=2), nn.Conv2d(4, 6, 1, 2)
        self.c, self.avg = nn.Conv2d(12, 4, 4, padding='same', dilation=(1, 2)), nn.AvgPool2d(2, 1)
        self.reflect, self.last = nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), nn.Identity()
        self.same, self.padded = nn.Conv2d(4, 4, 5, padding='same'), nn.Conv2d(4, 4, 5, padding=2)

    def forward(self, x):
        x = self.pool(F.relu(self.a(x)))
        y = self.b(x)
        y += self.short(x)
        x = torch.cat([y, F.avg_pool2d(F.pad(y, (3, -1, 1, 1)), 3, 1)], 1)  # the second path looks to the left
        x = self.avg(self.c(x).view(1, 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2))
        return self.last(self.reflect(x) + self.same(x) + self.padded(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_branches_equal_the_gradient_probe():
    "Paths that are not centred too. A max pool has a gradient to one pixel only, so the probe gets a mean"
    size, model = (3, 257, 257), Branches(nn.AvgPool2d)
    s = summary(model, size)
    assert fields(s) == probe(model, [r.name for r in s.rows], size) == fields(summary(Branches(nn.MaxPool2d), size))
    assert 2*s.macs == flops(model, size)


@pytest.mark.parametrize('name,field', [('resnet18', 435), ('mobilenet_v2', 491), ('vgg16', 212)])
def test_known_models(name, field):
    "The published fields of the last feature layer; on the meta device, so that nothing is computed"
    models = pytest.importorskip('torchvision.models')
    with torch.device('meta'): model = getattr(models, name)(weights=None)
    s = summary(model, (3, 224, 224))
    assert 2*s.macs == flops(model, (3, 224, 224)) and s.params == sum(p.numel() for p in model.parameters())
    assert max(map(len, repr(s).splitlines())) <= 100
    last = [r for r in s.rows if r.type == 'Conv2d' or r.type == 'MaxPool2d'][-1]
    assert last.field == (field, field)


def test_global_pooling_and_linear_see_the_whole_map():
    m = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert [r.field[0] for r in summary(m, (3, 33, 33)).rows] == [3, 33, 33, 33]
    m = nn.Sequential(nn.Flatten(), nn.Linear(3*16*8, 2))
    assert [r.field for r in summary(m, (3, 16, 8)).rows] == [(16, 8)]*2


@pytest.mark.parametrize('mix', [nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.ConvTranspose2d(4, 4, 3, padding=1)])
def test_what_mixes_positions_sees_the_whole_map(mix):
    "Although the map keeps its height and width"
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.last = mix, nn.ReLU()
        def forward(self, x):
            if not isinstance(mix, nn.MultiheadAttention): return self.last(self.mix(x))
            return self.last(self.mix(x[0], x[0], x[0])[0][None])
    assert fields(summary(Model(), (4, 8, 8)))['last'] == (8, 8)


def test_long_names_fit_the_terminal():
    class ALinearLayerWithALongName(nn.Linear): pass
    model = nn.Sequential()
    model.add_module('a_module_whose_name_fills_half_of_the_width', nn.Sequential(ALinearLayerWithALongName(3, 3)))
    lines = repr(summary(model, (3,))).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].split()[:2] == ['…fills_half_of_the_width.0', '…ayerWithALongName']


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x):
        x = self.conv(x)
        return self.last(x*self.fc(x.mean((2, 3), keepdim=True)).sigmoid())


def test_squeeze_and_excitation_sees_all():
    got = fields(summary(Squeeze(), (3, 20, 20)))
    assert got == dict(conv=(3, 3), fc=(22, 22), last=(22, 22))  # 20 pixels and the padding


@pytest.mark.parametrize('model,size', [
    (nn.Conv1d(3, 8, 5), (3, 40)), (nn.Conv3d(2, 4, 3, stride=2), (2, 9, 9, 9)),
    (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (4, 8, 8)),
    (nn.Linear(12, 5, bias=False), (12,)), (nn.Linear(12, 5), (7, 12)),
    (nn.Conv2d(4, 8, 3, groups=4, dilation=2), (4, 16, 16))])
def test_macs_of_single_layers(model, size):
    s = summary(model, size)
    assert 2*s.macs == flops(model, size) and [r.name for r in s.rows] == ['']
    assert '(model)' in repr(s)


class Shared(nn.Module):
    "One module twice, one weight in two modules, a frozen weight, a module that is not called"
    def __init__(self):
        super().__init__()
        self.conv, self.tied = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.unused, self.tied.weight = nn.Linear(5, 5), self.conv.weight
        self.conv.bias.requires_grad_(False)
    def forward(self, x): return {'out': [self.tied(self.conv(self.conv(x)))], 'n': 3}


def test_shared_parameters_count_once():
    s = summary(Shared(), (3, 8, 8))
    assert [(r.name, r.params) for r in s.rows] == [('conv', 84), ('conv', 0), ('tied', 0)]
    assert s.macs == 3*81*64 and (s.params, s.trainable) == (114, 111)
    assert '30 parameters belong to no row' in repr(s)


class Nothing(nn.Module):
    def forward(self, x): return None


def test_no_tensor_out_and_no_parameters():
    s = summary(nn.Sequential(nn.ReLU(), Nothing()), (3, 8, 8))
    assert s.rows[1] == Row('1', 'Nothing', None, 0, 0, None) and s.params == s.macs == 0 and isinstance(s, Summary)
    assert repr(s)


class Noisy(nn.Module):
    "Random even in eval mode; fails where asked to"
    def __init__(self, fail):
        super().__init__()
        self.bn, self.frozen, self.fail = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), fail
    def forward(self, x):
        x = self.frozen(self.bn(x + torch.rand_like(x)))
        if self.fail: raise KeyError('its own')
        return x


@pytest.mark.parametrize('fail', [False, True])
def test_leaves_no_trace(fail):
    model = Noisy(fail)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    if fail:
        with pytest.raises(KeyError, match='its own'): summary(model)
    else: summary(model)
    assert [m.training for m in model.modules()] == [True, True, False]
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dtype_of_the_model():
    assert summary(Net().double()).input_bytes == 8*3*32*32
    assert summary(Net().bfloat16()).param_bytes == 2*99_912


@pytest.mark.parametrize('size', [(), 32, None, '3', (3, 0, 32), (3, -1, 32), (3, 32.), (True, 32), (3, '32')])
def test_bad_input_size(size):
    with pytest.raises(ValueError, match='input_size is'): summary(Net(), size)


def test_bad_model():
    with pytest.raises(TypeError, match='give an nn.Module'): summary(Net)
    with pytest.raises(ValueError, match='at least 31'): summary(Net(), (3, 16, 16))


def test_fastai_counts_the_same():
    from fastai.callback.hook import layer_info
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    net = Net()
    learn = Learner(DataLoaders([], []), net, loss_func=F.cross_entropy)
    infos = layer_info(learn, torch.zeros(2, 3, 32, 32))
    assert sum(n for _, n, *_ in infos if n) == summary(net).params
