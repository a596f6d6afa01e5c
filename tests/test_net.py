"The Net against a plain rewrite of the original's classes, the reference's table, and broken weight files"
import copy, pickle, random, re
from pathlib import Path

import pytest, torch
from torch import nn
from torch.nn import functional as F

from s9_fastai.nets.net import ConvBlock, DepthwiseSeparableConv2d, Net, TransitionBlock, norm_layer
from s9_fastai.nets.original import load_original

TABLE = Path(__file__).parent/'data'/'s9_model_summary.txt'


# The original's structure, as its README describes it: the convolution of a block registered twice, fc made in forward.
class OriginalSeparable(nn.Module):
    def __init__(self, ni, nf, padding, dilation):
        super().__init__()
        self.depthwise = nn.Conv2d(ni, ni, (3, 3), padding=padding, dilation=dilation, groups=ni, bias=False)
        self.pointwise = nn.Conv2d(ni, nf, (1, 1), dilation=dilation, bias=False)
    def forward(self, x): return self.pointwise(self.depthwise(x))

class OriginalBlock(nn.Module):
    def __init__(self, ni, nf, norm, padding=1, dilation=1, stride=1, p=0., separable=False):
        super().__init__()
        if separable: self.conv = OriginalSeparable(ni, nf, padding, dilation)
        else: self.conv = nn.Conv2d(ni, nf, (3, 3), padding=padding, dilation=dilation, stride=stride, bias=False)
        norms = dict(bn=nn.BatchNorm2d(nf), gn=nn.GroupNorm(2 if nf%2 == 0 else 1, nf), ln=nn.GroupNorm(1, nf))
        self.convblock = nn.Sequential(self.conv, norms[norm], nn.ReLU(), nn.Dropout(p))
    def forward(self, x): return self.convblock(x)

class OriginalTransition(nn.Module):
    def __init__(self, ni, nf):
        super().__init__()
        self.conv1d = nn.Sequential(nn.Conv2d(ni, nf, (1, 1), bias=False))
    def forward(self, x): return self.conv1d(x)

class Original(nn.Module):
    def __init__(self, n_channels=38, norm='bn', dropout=0.1):
        super().__init__()
        c, h, p = n_channels, n_channels//2, dropout
        self.conv1 = OriginalBlock(3, h, norm)
        self.conv2 = OriginalBlock(h, h, norm)
        self.conv3 = OriginalBlock(h, c, norm, padding=0, stride=2)
        self.trans1 = OriginalTransition(c, h)
        self.conv4 = OriginalBlock(h, c, norm, p=p)
        self.conv5 = OriginalBlock(c, c, norm, p=p)
        self.conv6 = OriginalBlock(c, c, norm, padding=0, dilation=2, p=p)
        self.trans2 = OriginalTransition(c, h)
        self.conv7 = OriginalBlock(h, c, norm, separable=True, p=p)
        self.conv8 = OriginalBlock(c, c, norm, p=p)
        self.conv9 = OriginalBlock(c, c, norm, padding=0, dilation=4, p=p)
        self.trans3 = OriginalTransition(c, h)
        self.conv10 = OriginalBlock(h, c, norm, separable=True)
        self.conv11 = OriginalBlock(c, c, norm)
        self.conv12 = OriginalBlock(c, c, norm, padding=0)
        self.gap, self.fc = nn.AdaptiveAvgPool2d(1), None

    def forward(self, x):
        x = self.conv1(x)
        x = x + self.conv2(x)
        x = self.trans1(self.conv3(x))
        x = self.conv4(x)
        x = x + self.conv5(x)
        x = self.trans2(self.conv6(x))
        x = self.conv7(x)
        x = x + self.conv8(x)
        x = self.trans3(self.conv9(x))
        x = self.conv10(x)
        x = x + self.conv11(x)
        x = self.gap(self.conv12(x))
        if self.fc is None: self.fc = nn.Linear(x.shape[1]*x.shape[2]*x.shape[3], 10).to(x.device)
        return F.log_softmax(self.fc(x.view(x.size(0), -1)), dim=-1)


def original(**kwargs):
    "An original whose `fc` exists and whose running statistics and norm weights are not the initial ones"
    torch.manual_seed(3)
    m = Original(**kwargs)
    for _ in range(3): m(torch.randn(16, 3, 32, 32))
    for k, p in m.named_parameters():
        if '.convblock.1.' in k: nn.init.uniform_(p, 0.5, 1.5)
    return m


def reference_rows():
    "(type, shape, parameters) of the 88 rows in the reference's table"
    row = re.compile(r' *(\w+)-\d+ +\[-1, ([\d, ]+)\] +([\d,]+)$')
    found = [row.match(line) for line in TABLE.read_text().splitlines()]
    return [(m[1], tuple(map(int, m[2].split(', '))), int(m[3].replace(',', ''))) for m in found if m]


def listing(model):
    "Calls in the manner of torchsummary: hooks set through `apply`, so that a module of two parents has two"
    rows, handles = [], []
    def hook(m, args, out):
        n = sum(p.numel() for a in ('weight', 'bias') if (p := getattr(m, a, None)) is not None)
        rows.append((type(m).__name__.replace('Original', ''), tuple(out.shape[1:]), n, m))
    def register(m):
        if m is not model and not isinstance(m, nn.Sequential): handles.append(m.register_forward_hook(hook))
    model.apply(register)
    with torch.no_grad(): model.eval()(torch.zeros(2, 3, 32, 32))
    for h in handles: h.remove()
    return rows


_types = dict(Block='ConvBlock', Transition='TransitionBlock', Separable='DepthwiseSeparableConv2d')


def test_rewrite_of_the_original_prints_the_reference_table():
    "So the rewrite is the network that the reference measured; its fc row alone was written by hand there"
    rows = [(_types.get(t, t), shape, n) for t, shape, n, _ in listing(Original())]
    assert rows == reference_rows()[:87]  # torchsummary set its hooks before forward made fc
    assert reference_rows()[87] == ('Linear', (10,), 380)
    size = sum(2*4*torch.Size(shape).numel() for _, shape, _ in reference_rows())/2**20
    assert f'Forward/backward pass size (MB): {size:.2f}' in TABLE.read_text()


def test_every_reference_row_is_a_module_of_this_net():
    net, table = Net(), reference_rows()
    calls, names, doubled, i = listing(net), {m: n for n, m in net.named_modules()}, [], 0
    assert len(table) == 88 and sum(n for *_, n in table) == 196_422
    for t, shape, n, m in calls[:-1]:
        twice = isinstance(m, (nn.Conv2d, DepthwiseSeparableConv2d)) and not names[m].startswith('trans')
        for row in table[i:i + 1 + twice]: assert row == (t, shape, n), names[m]
        i += 1 + twice
        if twice: doubled.append((names[m], n))
    # the last row was added to the table by hand, with the weights of fc and without its biases
    assert i == 87 and table[87] == ('Linear', (10,), net.fc.weight.numel())
    assert calls[-1][:3] == ('Linear', (10,), net.fc.weight.numel() + net.fc.bias.numel())

    regular = [f'conv{i}.conv' for i in (1, 2, 3, 4, 5, 6, 8, 9, 11, 12)]
    separable = [f'conv{i}.conv{part}' for i in (7, 10) for part in ('', '.depthwise', '.pointwise')]
    assert sorted(n for n, _ in doubled) == sorted(regular + separable)
    ours, extra = sum(p.numel() for p in net.parameters()), sum(n for _, n in doubled)
    assert (ours, net.fc.bias.numel(), extra) == (99_912, 10, 96_520)
    assert ours - net.fc.bias.numel() == 99_902 and 99_902 + extra == 196_422


@pytest.mark.parametrize('norm', ['bn', 'gn', 'ln'])
def test_original_weights_give_the_same_logits_and_gradients(norm, tmp_path):
    ref = original(norm=norm)
    torch.save(ref.state_dict(), tmp_path/'original.pth')
    net = Net(norm=norm)
    assert load_original(net, str(tmp_path/'original.pth')) is net
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    with torch.no_grad(): assert torch.equal(F.log_softmax(net.eval()(x), dim=-1), ref.eval()(x))
    losses = []
    for m, loss in ((ref.train(), F.nll_loss), (net.train(), F.cross_entropy)):
        torch.manual_seed(5)  # the same dropout in both
        losses.append(loss(m(x), y))
        losses[-1].backward()
    assert torch.equal(*losses)
    assert torch.equal(net.conv1.conv.weight.grad, ref.conv1.conv.weight.grad)
    assert torch.equal(net.conv7.conv.depthwise.weight.grad, ref.conv7.conv.depthwise.weight.grad)
    assert torch.equal(net.trans3.conv.weight.grad, ref.trans3.conv1d[0].weight.grad)
    assert torch.equal(net.conv12.norm.bias.grad, ref.conv12.convblock[1].bias.grad)
    assert torch.equal(net.fc.bias.grad, ref.fc.bias.grad)
    if norm == 'bn': assert torch.equal(net.conv9.norm.running_var, ref.conv9.convblock[1].running_var)


def test_same_seed_same_initial_weights_as_the_original():
    torch.manual_seed(0)
    ref = Original()
    torch.manual_seed(0)
    net = Net()
    assert torch.equal(net.conv12.conv.weight, ref.conv12.conv.weight)


def _refused(sd, match, norm='bn'):
    net = Net(norm=norm)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=re.escape(match)): load_original(net, sd)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_every_key_is_needed_and_checked():
    sd = dict(original().state_dict())
    for k, t in sd.items():
        _refused({n: v for n, v in sd.items() if n != k}, f"'{k}'")
        _refused({**sd, k: torch.zeros(2, *t.shape, dtype=t.dtype)}, f"'{k}'")
    for k in sd:
        if '.convblock.0.' in k: _refused({**sd, k: sd[k] + 1e-6}, f"'{k}'")


@pytest.mark.parametrize('key,value,match', [
    ('conv13.conv.weight', torch.zeros(1), "'conv13.conv.weight': left over"),
    ('module.fc.bias', torch.zeros(10), "'module.fc.bias': left over"),
    (3, torch.zeros(1), 'key 3: left over'), ('fc.bias', [0.]*10, "'fc.bias': a list is not a tensor"),
    ('fc.bias', torch.zeros(10, dtype=torch.int64), "'fc.bias': torch.int64"),
    ('conv1.conv.weight', torch.zeros(19, 3, 3, 3).double(), "'conv1.conv.weight' and 'conv1.convblock.0.weight'")])
def test_wrong_entries_name_their_key(key, value, match): _refused({**original().state_dict(), key: value}, match)


def test_weights_of_another_net_are_refused():
    _refused(original(n_channels=36).state_dict(), "build the Net with the n_channels, norm and n_classes")
    _refused(original(norm='gn').state_dict(), "'conv1.convblock.1.running_mean': missing")
    _refused(original().state_dict(), "left over", norm='gn')
    _refused([1, 2], 'a list; give a state_dict')


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_damaged_files_are_one_kind_of_error(tmp_path):
    net, rng, fname = Net(), random.Random(0), tmp_path/'w.pth'
    before = copy.deepcopy(net.state_dict())
    for new_format in (True, False):
        torch.save({'fc.bias': torch.zeros(10)}, fname, _use_new_zipfile_serialization=new_format)
        whole = fname.read_bytes()
        for n in range(60):
            data = bytearray(whole[:rng.randrange(len(whole))] if n%3 == 0 else whole)
            for _ in range(4 if data else 0): data[rng.randrange(len(data))] = rng.randrange(256)
            fname.write_bytes(data)
            with pytest.raises(ValueError): load_original(net, fname)  # undamaged, it would lack most keys
    fname.write_bytes(b'')
    with pytest.raises(ValueError, match='w.pth: damaged') as e: load_original(net, fname)
    assert e.value.__cause__ is not None
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


class Touch:
    "Unpickled without care, makes a file"
    def __init__(self, fname): self.fname = str(fname)
    def __reduce__(self): return open, (self.fname, 'w')


@pytest.mark.parametrize('save', [lambda o, f: torch.save(o, f), lambda o, f: f.write_bytes(pickle.dumps(o, 2))])
def test_a_file_cannot_run_code(save, tmp_path):
    save({'fc.bias': Touch(tmp_path/'ran')}, tmp_path/'evil.pth')
    with pytest.raises(ValueError, match='evil.pth'): load_original(Net(), tmp_path/'evil.pth')
    assert not (tmp_path/'ran').exists()


def test_missing_file_and_folder(tmp_path):
    for fname in (tmp_path/'no.pth', tmp_path):
        with pytest.raises(FileNotFoundError, match='no such file'): load_original(Net(), fname)


@pytest.mark.parametrize('kw,match', [
    *[(dict(n_channels=n), 'n_channels is') for n in (37, 0, -2, 38., True, '38', None)],
    *[(dict(norm=n), "norm is .* must be 'bn', 'gn' or 'ln'") for n in ('batch', 'BN', None, ['bn'])],
    *[(dict(dropout=p), 'dropout is') for p in (1, 1., -0.1, float('nan'), float('inf'), '0.1', None, True)],
    *[(dict(n_classes=n), 'n_classes is') for n in (0, -1, 10., True, '10')],
    *[(dict(n_in=n), 'n_in is') for n in (0, 1025, 3., True)]])
def test_bad_arguments(kw, match):
    with pytest.raises(ValueError, match=match): Net(**kw)


@pytest.mark.parametrize('n_channels', [2, 6, 36, 38, 40])
@pytest.mark.parametrize('norm', ['bn', 'gn', 'ln'])
def test_every_width_and_norm_trains(n_channels, norm):
    net = Net(n_channels, norm, n_classes=7)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert net.fc.out_features == 7 and all(p.grad is not None for p in net.parameters())


def test_order_of_a_block_and_where_dropout_is():
    blocks = {n: m for n, m in Net(dropout=0.3).named_children() if isinstance(m, ConvBlock)}
    assert {n: m.drop.p for n, m in blocks.items()} == {f'conv{i}': 0.3 if 4 <= i <= 9 else 0. for i in range(1, 13)}
    assert all([n for n, _ in m.named_children()] == ['conv', 'norm', 'relu', 'drop'] for m in blocks.values())
    block, x = blocks['conv8'].eval(), torch.randn(2, 38, 5, 5)
    nn.init.constant_(block.norm.bias, 0.3)
    assert torch.equal(block(x), F.relu(block.norm(block.conv(x))))
    assert isinstance(norm_layer('gn', 38), nn.GroupNorm) and isinstance(TransitionBlock(4, 2).conv, nn.Conv2d)


@pytest.mark.parametrize('shape', [(1, 3, 23, 32), (1, 3, 32, 23), (1, 1, 32, 32), (3, 32, 32), (1, 3, 3, 32, 32)])
def test_bad_batches(shape):
    with pytest.raises(ValueError, match='give it'): Net()(torch.zeros(shape))


@pytest.mark.parametrize('n_in, h, w', [(3, 24, 24), (1, 28, 28), (13, 30, 64), (4, 31, 27)])
def test_small_images_and_other_channels(n_in, h, w):
    "The result is that of the image with zeros around it, to the bit"
    net, x = Net(8, n_in=n_in, n_classes=3).eval(), torch.randn(2, n_in, h, w)
    top, left = max(0, 31 - h)//2, max(0, 31 - w)//2
    padded = torch.zeros(2, n_in, max(h, 31), max(w, 31))
    padded[..., top:top + h, left:left + w] = x
    with torch.no_grad(): assert torch.equal(net(x), net(padded)) and net(x).shape == (2, 3)
    with pytest.raises(ValueError, match=rf'give it \(B, {n_in}, H, W\) with H and W at least 24'): net(x[:, :, :23])
    net.train()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.torch.jit:FutureWarning')
def test_survives_copy_pickle_script_trace_and_compile():
    net, x = Net().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = net(x)
        others = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.jit.script(net), torch.jit.trace(net, x),
                  torch.compile(net, backend='eager', fullgraph=True)]
        for other in others: torch.testing.assert_close(other(x), out)
