"The summary against independent counts (torch's flop counter, a gradient probe) and on awkward modules"
import copy
import random
from functools import partial

import numpy as np
import pytest, torch
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from s9_fastai.cifar.facts import Cifar10, Split
from s9_fastai.cifar.loaders import cifar_block
from s9_fastai.app.learner import s9_learner
from s9_fastai.nets.build import build_net
from s9_fastai.nets.net import ConvBlock, Net, TransitionBlock
from s9_fastai.report.summary import Summary, summary
from s9_fastai.report.trace import Row
from s9_fastai.test_utils import synth_dls, synth_model, synth_split


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
    assert len(s.rows) == 55 and max(map(len, repr(s).splitlines())) <= 80
    assert repr(s).split('\n')[0].split() == ['Layer', 'Type', 'Output', 'Params', 'MACs', 'Field']


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


@pytest.mark.parametrize('size', [(), 32, '3', (3, 0, 32), (3, -1, 32), (3, 32.), (True, 32), (3, '32')])
def test_bad_input_size(size):
    with pytest.raises(ValueError, match='input_size is'): summary(Net(), size)


def test_bad_model():
    with pytest.raises(TypeError, match='give an nn.Module'): summary(Net)
    with pytest.raises(ValueError, match='at least 24'): summary(Net(), (3, 16, 16))


def test_fastai_counts_the_same():
    from fastai.callback.hook import layer_info
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    net = Net()
    learn = Learner(DataLoaders([], []), net, loss_func=F.cross_entropy)
    infos = layer_info(learn, torch.zeros(2, 3, 32, 32))
    assert sum(n for _, n, *_ in infos if n) == summary(net).params


# products that are no layer of their own

def attention(q, k, d, kd=None):
    "Multiply-accumulates of multi-head attention by hand: the projections, then queries with keys and weights with values"
    kd = kd or d
    return 2*q*d*d + 2*k*kd*d + 2*q*k*d


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('need_weights', [False, True])
@pytest.mark.parametrize('kw', [{}, dict(batch_first=True, bias=False), dict(kdim=12, vdim=12), dict(num_heads=1)])
def test_attention(kw, need_weights, train):
    kw = dict(num_heads=4) | kw
    m, first = nn.MultiheadAttention(16, **kw).train(train), kw.get('batch_first')
    q, k = torch.zeros(1, 10, 16), torch.zeros(1, 7, kw.get('kdim', 16))
    if not first: q, k = q.transpose(0, 1), k.transpose(0, 1)
    s = summary(m, input_data=dict(query=q, key=k, value=k, need_weights=need_weights))
    assert [(r.name, r.macs, r.params) for r in s.rows] == [('', attention(10, 7, 16, kw.get('kdim')), s.params)]


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('mask', [False, True])
def test_transformer(mask, train):
    "Encoder and decoder; torch would run the encoder in one step in eval mode"
    d, ff, n, m = 16, 40, 9, 5
    kw = dict(d_model=d, nhead=2, num_encoder_layers=2, num_decoder_layers=1, dim_feedforward=ff, batch_first=True)
    model = nn.Transformer(**kw).train(train)
    data = dict(src=torch.zeros(1, n, d), tgt=torch.zeros(1, m, d))
    if mask: data['src_key_padding_mask'] = torch.arange(n)[None] > 6
    s = summary(model, input_data=data)
    assert s.macs == 2*(attention(n, n, d) + 2*n*d*ff) + attention(m, m, d) + attention(m, n, d) + 2*m*d*ff
    assert sum(r.params for r in s.rows) == s.params


class Products(nn.Module):
    "The same product, written in each way"
    def __init__(self, way):
        super().__init__()
        self.w, self.way = nn.Parameter(torch.zeros(6, 5)), way

    def forward(self, x): return self.way(x, self.w)


@pytest.mark.parametrize('way', [
    lambda x, w: x@w, lambda x, w: torch.matmul(x, w), lambda x, w: torch.einsum('bni,io->bno', x, w), lambda x, w: F.linear(x, w.T),
    lambda x, w: torch.bmm(x, w.expand(len(x), 6, 5)), lambda x, w: torch.tensordot(x, w, 1), lambda x, w: torch.stack([o.mm(w) for o in x]),
    lambda x, w: torch.baddbmm(torch.zeros(5), x, w.expand(len(x), 6, 5)), lambda x, w: torch.addbmm(torch.zeros(5), x, w.expand(len(x), 6, 5)),
    lambda x, w: torch.stack([x[0]@v for v in w.T]), lambda x, w: torch.stack([row@v for row in x[0] for v in w.T]),
    lambda x, w: F.conv1d(x.transpose(1, 2), w.T[..., None]), lambda x, w: torch.inner(x, w.T),
    lambda x, w: torch.stack([torch.addmv(torch.zeros(7), x[0], v) for v in w.T])])
def test_a_product_counts_however_it_is_written(way):
    s = summary(Products(way), (7, 6))
    assert [(r.name, r.macs, r.params) for r in s.rows] == [('', 7*6*5, 30)]


@pytest.mark.parametrize('kw', [{}, dict(is_causal=True), dict(enable_gqa=True), dict(attn_mask=torch.ones(9, 9, dtype=bool))])
def test_scaled_dot_product(kw):
    class Attend(nn.Module):
        def forward(self, q, kv): return F.scaled_dot_product_attention(q, kv, kv, **kw)
    heads = 2 if 'enable_gqa' in kw else 4
    s = summary(Attend(), input_data=(torch.zeros(1, 4, 9, 8), torch.zeros(1, heads, 9, 8)))
    assert s.macs == 2*4*9*9*8  # both products, whatever the mask leaves out


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])  # torch has one operation for the first and many for the other
@pytest.mark.parametrize('kind,kw,gates', [
    ('LSTM', {}, 4), ('LSTM', dict(num_layers=2, bidirectional=True), 4), ('LSTM', dict(proj_size=3), 4),
    ('GRU', dict(batch_first=True, bias=False), 3), ('RNN', {}, 1), ('RNN', dict(nonlinearity='relu', num_layers=3), 1)])
def test_recurrent_layers(kind, kw, gates, dtype):
    "Each weight once a step; packed sequences have the steps that they have"
    m, d, h = getattr(nn, kind)(6, 5, **kw).to(dtype), 6, 5
    out, sides = kw.get('proj_size') or h, 1 + kw.get('bidirectional', False)
    ins = [d] + [sides*out]*(kw.get('num_layers', 1) - 1)
    once = sides*sum(gates*h*(i + out) + (h*out if out < h else 0) for i in ins)
    x = torch.zeros(8, 2, 6, dtype=dtype)
    packed = nn.utils.rnn.pack_padded_sequence(x, [8, 3])
    if kw.get('batch_first'): x = x.transpose(0, 1)
    assert summary(m, input_data=x).macs == 16*once
    assert summary(m, input_data=packed).macs == 11*once


def test_cells_and_bilinear():
    s = summary(nn.LSTMCell(6, 5), input_data=torch.zeros(2, 6))
    assert s.macs == 2*4*5*(6 + 5)
    assert summary(nn.Bilinear(6, 5, 4), input_data=(torch.zeros(3, 6), torch.zeros(3, 5))).macs == 3*6*5*4
    assert summary(nn.Embedding(9, 4), input_data=torch.zeros(2, 7, dtype=int)).macs == 0


@pytest.mark.parametrize('name', ['resnet18', 'alexnet', 'convnext_tiny', 'vit_b_16', 'vit_b_32', 'swin_t', 'shufflenet_v2_x0_5',
                                  'efficientnet_b0', 'googlenet', 'squeezenet1_1'])
def test_published_counts(name):
    models = pytest.importorskip('torchvision.models')
    weights = models.get_model_weights(name).DEFAULT
    kw = dict(init_weights=False) if name == 'googlenet' else {}
    with torch.device('cpu' if name == 'swin_t' else 'meta'): model = models.get_model(name, weights=None, **kw)
    size = weights.transforms().crop_size[0]
    s = summary(model, (3, size, size))
    assert s.macs/1e9 == pytest.approx(weights.meta['_ops'], abs=6e-4)
    assert s.params == sum(p.numel() for p in model.parameters())


# inputs

class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 2)
    def forward(self, a, b): return self.head(torch.cat([self.body(a), self.body(b)], 1))


siamese_rows = [('body.0', 6*6*4*27), ('body.1', 0), ('body.2', 0)]*2 + [('head', 16)]


def rows(s): return [(r.name, r.macs) for r in s.rows]


def test_two_inputs():
    a, b = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    got = [summary(Siamese(), input_data=o) for o in ((a, b), [a, b], dict(b=b, a=a))]
    assert [rows(s) for s in got] == [siamese_rows]*3
    assert {s.input_bytes for s in got} == {2*4*3*64} and got[0].rows[0].params == 112 and got[0].rows[3].params == 0
    assert got[0].rows[-1].field == (8, 8)


def test_siamese_loaders():
    from fastai.data.core import Datasets
    from fastai.learner import Learner
    x = [torch.zeros(3, 8, 8)]*6
    dls = Datasets([0]*6, [[lambda i: x[0]], [lambda i: x[1]], [lambda i: 0]], n_inp=2, splits=[[0, 1, 2], [3, 4, 5]]).dataloaders(bs=2, num_workers=0)
    learn = Learner(dls, Siamese(), loss_func=F.cross_entropy)
    for s in (summary(learn), summary(learn.model, input_data=dls), summary(learn.model, input_data=dls.train)): assert rows(s) == siamese_rows


def test_an_image_beside_a_table():
    "The table has no pixels, so the field is that of the image"
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.last = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.ReLU()
        def forward(self, table, image): return self.last(self.conv(image) + self.fc(table)[..., None, None])
    s = summary(Both(), input_data=(torch.zeros(1, 5), torch.zeros(1, 3, 8, 8)))
    assert fields(s) == {'conv': (3, 3), 'fc': None, 'last': (3, 3)}


def test_token_ids():
    s = summary(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(28, 2)), input_data=torch.zeros(1, 7, dtype=int))
    assert [(r.shape, r.macs, r.field) for r in s.rows] == [((1, 7, 4), 0, None), ((1, 28), 0, None), ((1, 2), 56, None)]
    assert s.input_bytes == 7*8


def test_the_batch_that_is_given_is_what_is_counted():
    one, four = (summary(nn.Linear(5, 2), input_data=torch.zeros(n, 5)) for n in (1, 4))
    assert (one.macs, four.macs, four.rows[0].shape) == (10, 40, (4, 2))


def test_tabular_learner():
    import pandas as pd
    from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
    df = pd.DataFrame(dict(a=list('xyxyxyxy'), b=list('ppqqppqq'), c=range(8), d=range(8), y=list('uvuvuvuv')))
    dls = TabularDataLoaders.from_df(df, y_names='y', cat_names=['a', 'b'], cont_names=['c', 'd'], procs=[Categorify, Normalize],
                                     bs=2, valid_idx=[0, 1])
    learn = tabular_learner(dls, layers=[20, 10])
    widths = [sum(e.embedding_dim for e in learn.model.embeds) + 2, 20, 10, 2]
    s = summary(learn)
    assert s.macs == sum(a*b for a, b in zip(widths, widths[1:])) and [r.type for r in s.rows].count('Embedding') == 2
    assert sum(r.params for r in s.rows) == s.params


def test_language_model_keeps_its_state():
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model
    model = get_language_model(AWD_LSTM, 30, {**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 16, 'n_layers': 2})
    ids = torch.randint(0, 30, (1, 12))
    model.reset()
    model.eval()(ids)
    hidden, want = model[0].hidden, model(ids)[0]
    model.reset()
    model(ids)
    hidden = [[t.clone() for t in h] for h in model[0].hidden]
    s = summary(model, input_data=ids)
    assert all(torch.equal(a, b) for h, k in zip(hidden, model[0].hidden) for a, b in zip(h, k))
    assert torch.equal(model(ids)[0], want)  # the hidden state after the first pass, not after another
    assert s.macs == 12*(4*16*(8 + 16) + 4*8*(16 + 8) + 8*30)


def test_unet():
    from fastai.vision.learner import create_unet_model
    from torchvision.models import resnet18
    model = create_unet_model(resnet18, 3, (64, 64), pretrained=False)
    s = summary(model, (3, 64, 64))
    assert 2*s.macs == flops(model, (3, 64, 64)) and sum(r.params for r in s.rows) == s.params


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'convnext_atto', 'resnet10t', 'mixer_s32_224'])
def test_timm(name):
    timm = pytest.importorskip('timm')
    with torch.device('meta'): model = timm.create_model(name, pretrained=False)
    s = summary(model, (3, 224, 224))
    assert 2*s.macs == flops(model, (3, 224, 224)) and sum(r.params for r in s.rows) == s.params


def test_empty_validation_set():
    dls = synth_dls(8, bs=4)
    dls.loaders[1] = dls.valid.new([])
    assert summary(synth_model(), input_data=dls).rows == summary(synth_model(), (3, 32, 32)).rows
    with pytest.raises(ValueError, match='input_data has no tensor'): summary(synth_model(), input_data=dls.loaders[1])


def test_loaders_of_torch():
    data = torch.utils.data.TensorDataset(torch.zeros(8, 3, 32, 32), torch.zeros(8))
    dl = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
    state = dl.generator.get_state()
    assert summary(synth_model(), input_data=dl).rows == summary(synth_model(), (3, 32, 32)).rows
    assert torch.equal(dl.generator.get_state(), state)


def small_learner():
    "On a few shuffled, augmented images"
    data = Cifar10(*(Split(*o) for o in synth_split(32, 8)), 'synthetic', '0'*16)
    set_seed(3)
    dls = cifar_block(data, 'reference').dataloaders(range(40), bs=16, seed=3, num_workers=0, device='cpu')
    return s9_learner(dls)


def test_a_learner_goes_on_the_same():
    "Two Learners, one of them looked at, end with the same weights"
    res = []
    for look in (False, True):
        learn = small_learner()
        before = [(dict(vars(dl)), dl.rng.getstate()) for dl in learn.dls.loaders]
        if look: assert summary(learn).rows == summary(learn.model).rows
        assert before == [(dict(vars(dl)), dl.rng.getstate()) for dl in learn.dls.loaders]
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        res.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*res)


class Remembers(nn.Module):
    "All that a forward pass may leave behind"
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(()))
        self.register_buffer('last', torch.zeros(1))
        self.calls, self.cache, self.rng = [], {}, torch.Generator()
    def forward(self, x):
        self.n += 1
        self.last = x.sum() + torch.rand((), generator=self.rng) + random.random() + np.random.rand()
        self.calls.append(x)
        self.cache['x'] = self.new = x
        return x


def test_what_a_pass_leaves_is_put_back():
    m, last = Remembers(), torch.zeros(1)
    calls, cache, buffers, states = m.calls, m.cache, m._buffers, (random.getstate(), np.random.get_state()[1].tolist())
    m.last = last
    summary(m)
    assert m.n == 0 and m.last is last and m._buffers is buffers and not hasattr(m, 'new')
    assert m.calls is calls == [] and m.cache is cache == {} and torch.equal(m.rng.get_state(), torch.Generator().get_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
def test_scripted():
    model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2)))
    s = summary(model, (3, 5, 5))
    assert s.macs == 9*4*27 + 36*2 and model.training and model[1].training


def test_lazy_layers():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(affine=False), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r'0 \(LazyConv2d\), 1 \(LazyBatchNorm2d\), 3 \(LazyLinear\) has no weights before .*model\(x\)'):
        summary(model, (3, 5, 5))
    model(torch.zeros(2, 3, 5, 5))  # as the message says
    assert summary(model, (3, 5, 5)).macs == 9*4*27 + 36*2


@pytest.mark.parametrize('data,error', [('x', TypeError), (3, TypeError), (np.zeros((1, 3)), TypeError), ((), ValueError), ({}, ValueError)])
def test_bad_input_data(data, error):
    with pytest.raises(error, match='input_data (is a|has no tensor).*: give'): summary(Net(), input_data=data)


def test_tensors_in_place_of_a_size():
    x = torch.zeros(1, 3, 32, 32)
    for o in (x, (x, x)):
        with pytest.raises(ValueError, match='input_size is data.*tensors as input_data'): summary(Net(), o)
    assert summary(Net(), input_data=x).rows == summary(Net()).rows
    with pytest.raises(ValueError, match='leave one out'): summary(Net(), (3, 32, 32), x)


@pytest.mark.parametrize('arch', ['convnext_tiny', 'resnet18', 'efficientnet_b0'])
def test_field_of_a_library_network_is_what_a_pixel_reaches(arch):
    "The gradient of one unit in the middle is zero outside its field, and not zero at the ends of it; channels are last for some layers of a ConvNeXt"
    net, size = build_net(arch, 3).eval(), 256
    for m in net.modules():
        if type(m).__name__ == 'SqueezeExcitation': m.forward = lambda x: x  # it sees the whole image
        if isinstance(m, nn.MaxPool2d): m.forward = partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1)  # all of its window
        if isinstance(m, nn.ReLU): m.forward = F.silu
    rows = [r for r in summary(net, (3, size, size)).rows if r.shape and len(r.shape) == 4 and r.field[0] < size/2 and r.type == 'Conv2d']
    name, x = rows[-1].name, torch.randn(1, 3, size, size, requires_grad=True)
    kept = []
    net.get_submodule(name).register_forward_hook(lambda m, args, out: kept.append(out))
    net.double()(x.double())
    y, = kept
    y[0, :, y.shape[2]//2, y.shape[3]//2].sum().backward()
    for seen, want in zip((x.grad.abs().sum((0, 1, 3)), x.grad.abs().sum((0, 1, 2))), rows[-1].field):
        at = seen.nonzero().flatten()
        assert at[-1] - at[0] + 1 == want and want > 30
