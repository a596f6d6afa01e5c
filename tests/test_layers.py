"The fast layers in networks that are not ours, and under the tools that read a network or transform it"
import copy
import pickle

import pytest
import torch
from processes import python
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from s9_fastai.training.layers import FastBatchNorm2d, FastDropout, fast_layers, plain_layers

cl = torch.channels_last


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).contiguous(memory_format=cl)


# --- what stands around the fast layers

class SmallResNet(nn.Module):
    "In-place operations of three kinds right after batch norm: an activation, `+=`, and dropout"
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act, self.drop, self.head = nn.SiLU(inplace=True), nn.Dropout(0., inplace=True), nn.Linear(8, 10)

    def forward(self, x):
        x = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(x))
        y += x
        y.mul_(0.5)
        return self.head(self.drop(y).mean((2, 3)))


def tv(name, *args, **kwargs):
    "A class or function of one of torchvision's modules, called"
    return lambda: getattr(pytest.importorskip('torchvision.models.' + name.split('.')[0]), name.split('.')[1])(*args, **kwargs)


def small_resnext():
    m = pytest.importorskip('torchvision.models.resnet')
    return m.ResNet(m.Bottleneck, [1, 1, 1, 1], 10, groups=4, width_per_group=2)


def small_basic():
    m = pytest.importorskip('torchvision.models.resnet')
    return m.ResNet(m.BasicBlock, [1, 1, 1, 1], 10)


def small_vgg():
    m = pytest.importorskip('torchvision.models.vgg')
    return nn.Sequential(m.make_layers([8, 'M', 16], batch_norm=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def small_mobilenet():
    m = pytest.importorskip('torchvision.models.mobilenetv3')
    block = m.InvertedResidualConfig
    return m.MobileNetV3([block(16, 3, 16, 16, True, 'RE', 1, 1, 1.), block(16, 3, 32, 16, True, 'HS', 1, 1, 1.)], 32, 10, dropout=0.)


def small_efficientnet():
    m = pytest.importorskip('torchvision.models.efficientnet')
    return m.EfficientNet([m.MBConvConfig(2, 3, 1, 32, 16, 1)], dropout=0., stochastic_depth_prob=0., num_classes=10)


def small_timm():
    m = pytest.importorskip('timm.models.resnet')
    return m.ResNet(m.BasicBlock, [1, 1, 1, 1], num_classes=10, channels=(8, 8, 16, 16))


def small_unet():
    from fastai.vision.models.unet import DynamicUnet
    body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)))
    unet = DynamicUnet(body, 10, (16, 16), norm_type=None)
    unet.layers = unet.layers[:-1]  # the last one turns float64 into float32
    return nn.Sequential(unet, nn.BatchNorm2d(10), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())


networks = dict(
    ours=SmallResNet, resnet=small_basic, resnext=small_resnext, vgg=small_vgg, mobilenet=small_mobilenet, efficientnet=small_efficientnet,
    densenet=tv('densenet.DenseNet', 8, (2, 2), 16, num_classes=10), shufflenet=tv('shufflenetv2.ShuffleNetV2', [1, 1, 1], [8, 16, 32, 64, 64], 10),
    timm=small_timm, unet=small_unet)


def smooth(model):
    "Another activation for each ReLU, in place where that was: in float32 rounding turns a ReLU, and then gradients are others"
    for m in model.modules():
        for name, child in m.named_children():
            if isinstance(child, nn.ReLU): setattr(m, name, nn.SiLU(inplace=child.inplace))
    return model


def grads(model, x):
    "The gradients of `model` for some labels"
    nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
    return [p.grad for p in model.parameters()]


@pytest.fixture
def always(monkeypatch):
    "Fast layers that think that they pay for small batches too; gives the list of the folded kernel's inputs"
    monkeypatch.setattr(FastBatchNorm2d, 'least', 1)
    seen, real = [], FastBatchNorm2d.fast
    monkeypatch.setattr(FastBatchNorm2d, 'fast', lambda self, x: seen.append(x.shape) or real(self, x))
    return seen


def distances(got, want):
    "The largest differences of the gradients, as parts of the largest gradient"
    largest = max(g.abs().max() for g in want)
    return [((g - h).abs().max()/largest).item() for g, h in zip(got, want, strict=True)]


@pytest.mark.parametrize('name', networks)
def test_gradients_of_networks_that_change_what_batch_norm_gives(name, always):
    "In float64 those of the plain layers; in float32 as near to these as the plain layers come, or nearer"
    def make(dtype):  # a copy of the U-net would look at the activations of the original
        torch.manual_seed(0)
        return smooth(networks[name]()).to(dtype).to(memory_format=cl)
    x, found = rand(8, 3, 32, 32), {}
    for dtype in (torch.float64, torch.float32):
        a, b = make(dtype), fast_layers(make(dtype))
        found[dtype] = grads(a, x.to(dtype)), grads(b, x.to(dtype))
        for p, q in zip(a.buffers(), b.buffers()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert always, 'no layer was fast'
    exact, fast = found[torch.float64]
    assert max(distances(fast, exact)) <= 1e-9
    theirs, ours = (distances(o, exact) for o in found[torch.float32])
    assert max(ours) <= max(3e-6, 2*max(theirs))


def test_the_smallest_network_that_changes_in_place():
    "Without a fixture: from 2**17 values on the layer is fast"
    torch.manual_seed(0)
    a = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    b = fast_layers(copy.deepcopy(a).to(memory_format=cl))
    for n in (4, 8):  # torch's kernel for channels_last is itself off by 2e-6, its kernel for the default format is not
        for g, h in zip(grads(a, rand(n, 3, 32, 32).contiguous()), grads(b, rand(n, 3, 32, 32))): torch.testing.assert_close(g, h, rtol=0, atol=3e-6)
    assert b[1].num_batches_tracked == 2 and b[1](rand(8, 16, 32, 32)).is_contiguous(memory_format=cl)


def test_double_backward_is_torchs(always):
    "A gradient penalty, as of a GAN: the derivative of the length of a gradient"
    def penalty(model, x):
        g, = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]
    torch.manual_seed(0)
    a = SmallResNet().double().to(memory_format=cl)
    b, x = fast_layers(copy.deepcopy(a)), rand(4, 3, 8, 8).double()
    want, got = (penalty(m, x.clone().requires_grad_()) for m in (a, b))
    assert always and want[0].abs().max() > 0
    for g, h in zip(want, got): torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('shape', [(4096, 16, 1, 1), (1, 4, 1, 4096), (1, 2, 256, 256), (2, 64, 2, 512)], ids=str)
def test_unusual_images(shape, always):
    for a, b in zip(*(outcome(c, rand(*shape).double()) for c in (nn.BatchNorm2d, FastBatchNorm2d))): torch.testing.assert_close(a, b)
    assert always


def outcome(cls, x):
    bn = cls(x.shape[1]).to(x.dtype)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = bn(input=x)  # by the name that torch's layer has for it
    (y**2*torch.arange(1, x.shape[1] + 1)[:, None, None]).sum().backward()
    return y.detach(), x.grad, bn.running_mean, bn.running_var


@pytest.mark.parametrize('dtype, weights', [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_formats_without_exact_statistics_are_left_to_torch(dtype, weights, always):
    a, b = nn.BatchNorm2d(19).to(weights), FastBatchNorm2d(19).to(weights)
    x = rand(8, 19, 8, 8, dtype=dtype)
    assert torch.equal(a(x), b(x)) and torch.equal(a.running_var, b.running_var) and not always


@pytest.mark.parametrize('shape', [(8, 4, 16), (2, 4, 4, 4, 4), (0, 4, 8, 8)], ids=str)
def test_other_inputs_end_as_with_torch(shape, always):
    def end(bn):
        try: return bn(torch.zeros(shape)).shape
        except ValueError as e: return str(e)
    assert end(nn.BatchNorm2d(4)) == end(FastBatchNorm2d(4))


def test_a_fastai_tensor_keeps_its_type(always):
    from fastai.vision.core import TensorImage
    x = TensorImage(rand(8, 4, 8, 8))
    y = FastBatchNorm2d(4)(x)
    assert type(y) is type(nn.BatchNorm2d(4)(x)) and always
    torch.testing.assert_close(y.as_subclass(torch.Tensor), nn.BatchNorm2d(4)(rand(8, 4, 8, 8)))


# --- tools that read a program or transform it

def pair():
    "A plain network, and the same one with fast layers"
    torch.manual_seed(0)
    a = SmallResNet().to(memory_format=cl)
    a.drop = nn.Dropout(0.)
    return a, fast_layers(copy.deepcopy(a))


def compiled(model): return torch.compile(model, backend='aot_eager')
def traced(model): return torch.jit.trace(model, rand(8, 3, 32, 32), check_trace=False)
def exported(model): return torch.export.export(model, (rand(8, 3, 32, 32),), strict=False).module()
def counted(model):
    def f(x):
        with FlopCounterMode(display=False) as flops: y = model(x)
        assert flops.get_total_flops() == 2*8*32*32*8*(27 + 72) + 2*8*8*10
        return y
    return lambda_module(f, model)
def pickled(model): return pickle.loads(pickle.dumps(model))
def synced(model):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model.norm1) is nn.SyncBatchNorm
    return nn.Sequential(model.eval())  # in training it needs a GPU


@pytest.mark.parametrize('tool', [torch.jit.script, torch.fx.symbolic_trace, traced, compiled, exported, counted, nn.DataParallel, copy.deepcopy, pickled, synced],
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
def test_a_tool_gives_what_it_gives_for_the_plain_layers(tool, training, always):
    a, b = pair()
    x = rand(8, 3, 32, 32)
    a, b = tool(a.train(training)), tool(b.train(training))
    torch.testing.assert_close(b(x), a(x), rtol=1e-5, atol=1e-5)
    for p, q in zip(a.buffers(), b.buffers(), strict=True): torch.testing.assert_close(p, q)


@pytest.mark.parametrize('tool', [torch.jit.script, torch.fx.symbolic_trace], ids=lambda f: f.__name__)
def test_a_recorded_model_still_changes_its_mode(tool):
    a, b = pair()
    b.drop = FastDropout(0.5)
    again = tool(b)
    again.eval()
    x = rand(8, 3, 32, 32)
    torch.testing.assert_close(again(x), a.eval()(x), rtol=1e-5, atol=1e-5)
    again.train()
    assert not torch.equal(again(x), again(x))


def test_operations_are_recorded_as_those_of_the_plain_layers():
    a, b = pair()
    b.drop.p = a.drop.p = 0.5
    targets = [[str(n.target) for n in make_fx(m)(rand(8, 3, 32, 32)).graph.nodes if n.op == 'call_function'] for m in (a, b)]
    assert targets[0] == targets[1] and [t for t in targets[0] if 'batch_norm' in t]


def test_a_script_is_saved_and_loaded_without_the_package(tmp_path):
    _, b = pair()
    torch.jit.script(b.eval()).save(tmp_path/'net.pt')
    code = f"import torch, sys; m = torch.jit.load(r'{tmp_path/'net.pt'}'); print(m(torch.zeros(1, 3, 8, 8)).sum().item(), 's9_fastai' in sys.modules)"
    out = python(code).split()
    assert float(out[0]) == pytest.approx(b(torch.zeros(1, 3, 8, 8)).sum().item(), abs=1e-5) and out[1] == 'False'


def test_fx_records_a_fast_layer_as_one_call():
    a, b = pair()
    nodes = [[(n.op, n.target) for n in torch.fx.symbolic_trace(m).graph.nodes] for m in (a, b)]
    assert nodes[0] == nodes[1] and ('call_module', 'norm1') in nodes[1]
    extract = pytest.importorskip('torchvision.models.feature_extraction').create_feature_extractor
    assert extract(b, ['norm2'])(rand(8, 3, 32, 32))['norm2'].shape == (8, 8, 32, 32)


def test_transforms_of_functions_go_through_torchs_layers():
    def loss(model):
        def f(params, buffers): return torch.func.functional_call(model, (params, buffers), (rand(8, 3, 32, 32),)).square().sum()
        return torch.func.grad(f)(dict(model.named_parameters()), dict(model.named_buffers()))
    a, b = pair()
    want, got = loss(a), loss(b)
    for k, g in want.items(): torch.testing.assert_close(g, got[k])
    tangents = []
    for m in (a, b):
        with forward_ad.dual_level():
            y = m(forward_ad.make_dual(rand(8, 3, 32, 32), rand(8, 3, 32, 32, seed=1)))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)
    drop = FastDropout(0.5)
    y = torch.func.vmap(drop, randomness='different')(torch.ones(4, 1000))
    assert y.shape == (4, 1000) and not torch.equal(y[0], y[1])


def test_activation_checkpoints(always):
    from torch.utils.checkpoint import checkpoint
    torch.manual_seed(0)
    a = SmallResNet().to(memory_format=cl)
    b, x = fast_layers(copy.deepcopy(a)), rand(8, 3, 32, 32)
    want, got = grads(a, x), grads(lambda_module(lambda x: checkpoint(b, x, use_reentrant=False), b), x)
    for g, h in zip(want, got): torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5)


def lambda_module(f, model):
    "A module that calls `f` and has the parameters of `model`"
    module = nn.Module()
    module.model, module.forward = model, f
    return module


def test_frozen_statistics_stay_and_are_used(always):
    a, b = pair()
    for m in (a, b): m.train(), m.norm1.eval()
    x = rand(8, 3, 32, 32)
    for g, h in zip(grads(a, x), grads(b, x)): torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5)
    assert b.norm1.num_batches_tracked == 0 and len(always) == 1


def test_dropout_of_numbers_that_are_no_fractions():
    for x in (torch.ones(100, dtype=torch.int64), torch.ones(100, dtype=torch.complex64)):
        def end(drop):
            torch.manual_seed(0)
            try: return drop(x).tolist()
            except RuntimeError as e: return str(e)
        assert end(FastDropout(0.5)) == end(nn.Dropout(0.5))


def test_the_way_back_restores_every_class():
    a, b = pair()
    class Mine(FastDropout): pass
    b.mine = Mine(0.1)
    assert plain_layers(b) is b and type(b.mine) is Mine
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules() if m is not b.mine]
