"""Explanations of a network: each number against another library or a plain computation, and nothing that is looked at changes"""
import json
import os
import random
from itertools import combinations
from pathlib import Path

import albumentations as A
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.vision.augment import Brightness, Flip, RandomResizedCrop
from fastai.vision.core import PILImage, PILMask
from fastai.vision.data import BBoxBlock, BBoxLblBlock, CategoryBlock, ImageBlock, MaskBlock, PointBlock
from fastai.vision.models.unet import DynamicUnet
from fastcore.basics import first
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from s9_fastai.app.apart import transforms_apart
from s9_fastai.app.compare import EXPERIMENT, compare_runs, plot_runs
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.app.run import Run, RunOptions
from s9_fastai.augment.item import AlbumentationsTransform
from s9_fastai.cifar.facts import CLASSES
from s9_fastai.cifar.loaders import cifar_block, cifar_dls
from s9_fastai.nets.net import Net
from s9_fastai.nets.tta import FlipTTA
from s9_fastai.report.augmentations import augmented_items, show_augmentations
from s9_fastai.report.cam import class_maps, grad_cam
from s9_fastai.report.cam_plots import plot_cam, plot_cam_mistakes
from s9_fastai.report.compare import compare_histories, plot_comparison
from s9_fastai.report.features import features, plot_similar, similar, suspicious_labels
from s9_fastai.report.field_map import field_maps, plot_field
from s9_fastai.report.filters import first_filters, plot_filters
from s9_fastai.report.inputs import pictures, seen_items
from s9_fastai.report.labels import percent
from s9_fastai.report.loader import plain_loader
from s9_fastai.report.mistakes import misclassified
from s9_fastai.report.summary import summary
from s9_fastai.test_utils import quiet, synth_cifar, synth_dls, synth_learner

root = Path(__file__).resolve().parent.parent
has_cifar = pytest.mark.skipif(not os.environ.get('S9_CIFAR10'), reason='S9_CIFAR10 is not set')


def raises(e, text): return pytest.raises(e, match='(?s)' + text)


@pytest.fixture(scope='module')
def net(): return Net.pretrained()


@pytest.fixture(scope='module')
def res():
    torch.manual_seed(0)
    model = resnet18(num_classes=10).train()
    with torch.no_grad(): model(torch.randn(16, 3, 64, 64))  # running statistics that are not 0 and 1
    return model.eval()


@pytest.fixture(scope='module')
def dls(): return cifar_dls('sample', bs=100, seed=0)


@pytest.fixture(scope='module')
def learn(dls): return quiet(s9_learner(dls, model=Net.pretrained())).to_plain()  # in float32 on any machine


def small(augment='item', policy='reference', bs=16):
    "The loaders of 60 training and 20 validation images"
    block = cifar_block(synth_cifar(60, 20), policy, augment)
    return block.dataloaders(range(80), bs=bs, seed=7, num_workers=0, device='cpu', drop_last=False)


def images(n=4, sz=32, seed=0): return torch.randn(n, 3, sz, sz, generator=torch.Generator().manual_seed(seed))


def everything(model):
    "All that an explanation could change in a model"
    return dict(modes=[m.training for m in model.modules()], attrs=[{k: v for k, v in vars(m).items() if not isinstance(v, dict)} for m in model.modules()],
                hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
                state={k: v.clone() for k, v in model.state_dict().items()}, needs=[p.requires_grad for p in model.parameters()],
                grads=[None if p.grad is None else p.grad.clone() for p in model.parameters()], rng=torch.get_rng_state(), py=random.getstate())


def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b) and a.stride() == b.stride()
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a is b or a == b


# Grad-CAM

@pytest.mark.parametrize('which, layer', [('net', 'conv8'), ('net', 'conv6'), ('net', 'conv11'), ('net', 'conv4.conv'), ('res', 'layer4'), ('res', 'layer3')])
def test_cam_equals_torchcam(which, layer, request):
    torchcam = pytest.importorskip('torchcam.methods')
    model, x = request.getfixturevalue(which), images(4, 32 if which == 'net' else 96)
    ours = class_maps(model, x, layer, [3, 1, 3, 0])
    with torchcam.GradCAM(model, target_layer=layer) as cam: theirs, = cam([3, 1, 3, 0], model(x), normalized=False)
    assert ours.maps.max() > 0
    torch.testing.assert_close(ours.maps/ours.maps.max(), theirs/theirs.max(), atol=1e-5, rtol=0)
    torch.testing.assert_close(grad_cam(model, x, layer, [3, 1, 3, 0]), theirs/theirs.amax((1, 2), keepdim=True).clamp(min=1e-30), atol=1e-5, rtol=0)


def by_hand(model, x, layer, target):
    "One image at a time, through a copy that has no in-place ReLU; what the block adds in place has a gradient of 1"
    maps = []
    for m in model.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
    for xi, t in zip(x, target):
        acts = []
        h = model.get_submodule(layer).register_forward_hook(lambda m, a, out: acts.extend([out, out.detach().clone()]))
        out = model(xi[None])
        h.remove()
        g, = torch.autograd.grad(out[0, t], acts[0])
        maps.append((g.mean((2, 3), keepdim=True)*acts[1]).sum(1)[0].relu())
    return torch.stack(maps)


def test_cam_with_relus_that_work_in_place(res):
    "The map is that of the layer itself, also where the next layer changes it in place"
    import copy
    x = images(2, 96)
    for layer in ('layer2.0.bn1', 'conv1', 'bn1', 'layer4.1.bn2'):
        torch.testing.assert_close(class_maps(res, x, layer, [3, 1]).maps, by_hand(copy.deepcopy(res), x, layer, [3, 1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('around', ['none', 'no_grad', 'inference', 'frozen', 'train', 'channels_last', 'grads', 'fast'])
def test_cam_leaves_the_model_as_it_was(around, dls):
    model = Net.pretrained()
    expected, x = grad_cam(model, images()), images()
    if around == 'frozen': model.requires_grad_(False)
    if around == 'train': model.train()
    if around == 'channels_last': model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if around == 'grads': model(x).sum().backward()
    if around == 'fast':
        learn = quiet(s9_learner(dls, model=model)).to_fast()
        model.train()
    before = everything(model)
    with torch.inference_mode() if around == 'inference' else torch.no_grad() if around == 'no_grad' else torch.enable_grad():
        maps = grad_cam(learn if around == 'fast' else model, x)
    assert same(everything(model), before)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=0)


def test_a_fast_network_in_training_mode_is_explained_as_in_evaluation(dls):
    "Batch norm of a large batch is a custom autograd function in training"
    learn = quiet(s9_learner(dls, model=Net.pretrained())).to_fast()
    x = images(128)
    torch.testing.assert_close(grad_cam(learn, x), grad_cam(Net.pretrained(), x), atol=1e-4, rtol=0)


class Bright(nn.Module):
    "Class 0 if there is a bright square, class 1 if there is none"
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False)
        nn.init.ones_(self.conv.weight)
        with torch.no_grad(): self.fc.weight.copy_(torch.tensor([[1.], [-1.]]))

    def forward(self, x): return self.fc(self.act(self.conv(x)).mean((2, 3)))


def test_cam_finds_the_place_that_speaks_for_a_class():
    x = torch.zeros(1, 3, 16, 16)
    x[:, :, 3:7, 9:12] = 1
    assert torch.equal(grad_cam(Bright(), x, target=0)[0], x[0, 0])
    assert grad_cam(Bright(), x, target=1).max() == 0  # nothing speaks for the other class


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x): return self.model(x)


@pytest.mark.parametrize('make, sz, layer, hw', [
    (lambda: Net(), 32, 'conv8', (11, 11)), (lambda: resnet18(), 160, 'layer4', (5, 5)), (lambda: Wrapped(resnet18()), 160, 'model.layer4', (5, 5)),
    (lambda: timm.create_model('vit_tiny_patch16_224', img_size=64), 64, 'blocks.10', (4, 4)),
    (lambda: timm.create_model('vit_tiny_patch16_224', img_size=64, global_pool='avg', class_token=False), 64, 'norm', (4, 4)),
    (lambda: timm.create_model('swin_tiny_patch4_window7_224', img_size=224), 224, 'norm', (7, 7)),
    (lambda: timm.create_model('efficientnet_lite0'), 128, 'bn2', (4, 4))])
def test_the_layer_without_a_name(make, sz, layer, hw):
    cams = class_maps(make(), images(1, sz))
    assert (cams.layer, cams.maps.shape[1:]) == (layer, hw)


def test_cam_of_tokens_is_in_the_places_of_the_image():
    "A token that is the mean of its patch, and a class that is the mean of the tokens"
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.fc = nn.Identity(), nn.Linear(1, 2, bias=False)
            with torch.no_grad(): self.fc.weight.copy_(torch.tensor([[1.], [-1.]]))

        def forward(self, x):
            t = F.avg_pool2d(x.mean(1, keepdim=True), 8).flatten(2).transpose(1, 2)  # (N, 24, 1)
            t = self.patches(torch.cat([t.new_zeros(len(x), 1, 1), t], 1))  # a class token first
            return self.fc(t.mean(1))
    x = torch.zeros(1, 3, 32, 48)
    x[..., 8:16, 40:48] = 1
    m = grad_cam(Tokens(), x, 'patches', 0)[0]
    assert m.shape == (4, 6) and m.argmax() == 1*6 + 5


def test_cam_of_a_unet():
    torch.manual_seed(0)
    encoder = nn.Sequential(*list(resnet18().children())[:-2])
    unet = DynamicUnet(encoder, 3, (32, 32)).eval()
    x = images(2, 32)
    with raises(ValueError, 'the output is a map.*name a layer'): grad_cam(unet, x)
    assert grad_cam(unet, x, 'layers.0.5', target=2).shape == (2, 4, 4)  # the end of the encoder
    assert len(field_maps(unet, (3, 32, 32))) > 3


def test_cam_inputs_that_cannot_be(net, learn):
    x = images()
    with raises(ValueError, r'x is \(3, 32, 32\), but must be a batch of images .* give x\[None\]'): grad_cam(net, x[0])
    assert grad_cam(net, x[0][None]).shape == (1, 11, 11)
    with raises(ValueError, 'target is 10, but must be a class from 0 to 9'): grad_cam(net, x, target=10)
    with raises(ValueError, "layer 'fc' puts out .* which is no map"): grad_cam(net, x, 'fc')
    with raises(ValueError, "layer is 'conv13', which is no module of the model"): grad_cam(net, x, 'conv13')
    with raises(ValueError, 'no block of the model that is called once has a map'): grad_cam(FlipTTA(net), x)
    with raises(TypeError, 'model is a str: give an nn.Module or a Learner'): grad_cam('net', x)
    with raises(ValueError, 'idx is 500, but set 1 has the items 0 to 499'): plot_cam(learn, 500)
    assert grad_cam(net, x, net.conv8, torch.tensor([1, 2, 3, 4])).shape == (4, 11, 11)


def test_cam_of_one_logit():
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))
    ax = plot_cam(model, images(1)).axes[0]
    p = model(images(1)).sigmoid().item()
    assert ax.get_title() == f'0 ({percent(p)})'


def test_the_picture_of_a_cam(learn):
    ax = plot_cam(learn, 7, classes=['$a_b$']*10).axes[0]
    seen = seen_items(learn.dls, [7])
    p = learn.model(seen.x).softmax(1)[0]
    assert ax.get_title() == f'$a_b$ ({percent(p.max().item())})'
    np.testing.assert_allclose(ax.images[0].get_array(), seen.images[0].mean(-1))
    m = F.interpolate(grad_cam(learn, seen.x)[None], (32, 32), mode='bilinear')[0, 0]
    np.testing.assert_allclose(ax.images[1].get_array(), m, atol=1e-6)
    ax.figure.canvas.draw()  # a name is no formula


def test_the_mistakes_and_their_maps(learn, tmp_path):
    state = everything(learn.model)
    fig = plot_cam_mistakes(learn, 3, path=tmp_path/'a.png')
    wrong = misclassified(learn).head(3)
    titles = np.array([ax.get_title() for ax in fig.axes]).reshape(3, 3)
    assert titles[:, 0].tolist() == [f'item {i}' for i in wrong['index']]
    assert all(t.startswith(f'predicted: {o.predicted} ({percent(o.prob)})') for t, o in zip(titles[:, 1], wrong.itertuples()))
    assert [t.split(' (')[0] for t in titles[:, 2]] == [f'true: {o}' for o in wrong.true]
    assert (tmp_path/'a.png').stat().st_size > 1000 and same(everything(learn.model), state)
    with raises(ValueError, 'n is 0, but must be'): plot_cam_mistakes(learn, 0)


def test_no_mistakes():
    class Right(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 1)

        def forward(self, x): return F.one_hot(right[:len(x)], 10).float() + 0*self.conv(x).mean((2, 3))
    data = small(bs=20)
    right = torch.tensor([int(y) for y in data.valid.dataset.tls[1]])
    assert plot_cam_mistakes(quiet(s9_learner(data, model=Right()))).texts[0].get_text() == 'no item is misclassified'


# the receptive field

def test_fields_are_those_of_the_summary():
    for model, sz in ((Net(), 64), (resnet18(), 64)):
        rows = summary(model, (3, sz, sz)).rows
        names = [r.name for r in rows]
        of_layer = {r.name: r.field for r in rows if names.count(r.name) == 1 and r.name not in ('fc', 'gap', 'avgpool')}
        found = field_maps(model, (3, sz, sz), [*of_layer])
        assert len(found) > 15
        for f in found:
            top, bottom, left, right = f.box
            assert (bottom - top + 1, right - left + 1) == f.size == of_layer[f.name], f.name
            rows, cols = np.nonzero(f.seen)
            assert rows.min() >= top and rows.max() <= bottom and cols.min() >= left and cols.max() <= right
            if f.size[0] < sz/2: assert (rows.min(), rows.max(), cols.min(), cols.max()) == f.box, f.name  # inside the image: exactly


def taps(u, layers, n):
    "Pixels along one axis that unit `u` uses, through `layers` of (taps, stride, padding, dilation, size of the input)"
    for k, s, p, d, size in reversed(layers): u = {q*s - p + i*d for q in u for i in range(k) if 0 <= q*s - p + i*d < size}
    return sorted(u)


@pytest.mark.parametrize('seed', range(12))
def test_pixels_of_dilated_networks_against_numpy(seed):
    rng = np.random.default_rng(seed)
    n, ni, parts, layers = int(rng.integers(40, 60)), 3, [], []
    size = n
    for _ in range(int(rng.integers(1, 4))):
        k, s, p, d = (int(rng.integers(*o)) for o in ((1, 4), (1, 3), (0, 3), (1, 4)))
        p = min(p, k//2)
        if rng.random() < 0.3 and k > 1: parts.append(nn.MaxPool2d(k, s, p)); d = 1
        else:
            parts.append(nn.Conv2d(ni, 6, k, s, p, d, groups=3 if rng.random() < 0.3 else 1))
            ni = 6
        layers.append((k, s, p, d, size))
        size = (size + 2*p - d*(k - 1) - 1)//s + 1
        parts.append([nn.BatchNorm2d(ni), nn.ReLU(inplace=True), nn.GELU(), nn.Dropout()][rng.integers(4)])
    model = nn.Sequential(*parts)
    for m in parts:
        if isinstance(m, nn.Conv2d): nn.init.constant_(m.weight, -1)  # so that a ReLU would be closed
    rows = taps({size//2}, layers, n)
    expected = np.zeros((n, n), bool)
    expected[np.ix_(rows, rows)] = True
    f = field_maps(model, (3, n, n), [str(len(parts) - 1)])[0]
    np.testing.assert_array_equal(f.seen, expected)
    assert f.paths.max() == 1 and (f.paths >= 0).all()


def test_paths_are_counted():
    f = field_maps(nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Conv2d(1, 1, 3, bias=False)), (1, 9, 9), ['1'])[0]
    along = np.convolve([1, 1, 1], [1, 1, 1])
    np.testing.assert_allclose(f.paths[2:7, 2:7], np.outer(along, along)/9)


def test_looking_at_fields_leaves_the_model_as_it_was(res):
    for model in (Net().train(), res):
        state = everything(model)
        field_maps(model, (3, 64, 64))
        assert same(everything(model), state)


def test_the_picture_of_the_fields(tmp_path):
    model, x = Net(), images(1)
    fields, fig = field_maps(model, x), plot_field(model, x, path=tmp_path/'f.png')
    assert [ax.get_title() for ax in fig.axes if ax.get_title()] == [f'{f.name}: {f.size[0]}x{f.size[1]}' for f in fields]
    assert [f.size for f in fields[:4]] == [(3, 3), (5, 5), (7, 7), (11, 11)]
    for ax, f in zip(fig.axes, fields):
        box = ax.patches[0]
        assert (box.get_x() + 0.5, box.get_y() + 0.5, box.get_width(), box.get_height()) == (f.box[2], f.box[0], *f.size[::-1])
        np.testing.assert_array_equal(ax.images[1].get_array()[..., 3] > 0, f.seen)
    assert len(plot_field(model, (3, 40, 60), ['conv6', 'conv9.conv']).axes) == 2
    with raises(ValueError, "layer 'fc' has no map, or is called more than once: choose from conv1.conv"): plot_field(model, x, ['fc'])
    with raises(ValueError, r'image is 32, but must be one image \(C, H, W\) or its size'): plot_field(model, 32)


# filters

@pytest.mark.parametrize('ni, n', [(3, 7), (1, 9), (5, 4), (2, 1)])
def test_filters_are_drawn_as_they_are(ni, n):
    conv = nn.Conv2d(ni, n, (2, 3))
    ax = plot_filters(nn.Sequential(conv), cols=2).axes[0]
    drawn, w = np.asarray(ax.images[0].get_array()), conv.weight.detach().numpy()
    assert first_filters(nn.Sequential(conv)).shape == w.shape
    c = 1 if ni == 3 else ni
    for i in range(n):
        row, col = divmod(i, 2)
        for k in range(ni):
            top, left = row*(3*c + (2 if c > 1 else 0)) + (0 if ni == 3 else 3*k), 4*col
            tile = drawn[top:top+2, left:left+3, k if ni == 3 else 0]
            np.testing.assert_allclose(tile, 0.5 + w[i, k]/(2*np.abs(w[i]).max()), atol=1e-6)
    with raises(ValueError, 'the model has no nn.Conv2d'): plot_filters(nn.Linear(2, 2))


# items and pictures

def test_seen_items_are_the_plain_ones(dls):
    before = [{k: v for k, v in vars(dl).items()} for dl in dls.loaders]
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    seen = seen_items(dls, [5, 1999, 5], 0)
    for i, image in zip([5, 1999, 5], seen.images): np.testing.assert_allclose(image, np.asarray(dls.train.dataset.tls[0].tfms.fs[0].look_up(dls.train.dataset.items[i])[0])/255, atol=1/254)
    assert torch.equal(seen.x[0], seen.x[2])
    assert all(vars(dl) == b for dl, b in zip(dls.loaders, before))
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1]) and (np.random.get_state()[1] == state[2]).all()


def test_pictures_of_any_images():
    x = torch.tensor([-2., 0, 6]).view(1, 1, 1, 3)
    np.testing.assert_allclose(pictures(x)[0], [[0, 0.25, 1]])
    assert pictures(torch.zeros(1, 4, 5, 6))[0].shape == (5, 6) and pictures(torch.zeros(2, 3, 5, 6))[1].shape == (5, 6, 3)
    np.testing.assert_allclose(pictures(torch.full((1, 3, 1, 1), 7.))[0], np.zeros((1, 1, 3)))


# features

def test_features_are_the_input_of_the_last_linear_layer(learn, dls, res):
    state, f = everything(learn.model), features(learn, dls.valid)
    with torch.no_grad():
        expected = torch.cat([learn.model.gap(trunk(learn.model, x)).flatten(1) for x, _ in dls.valid])
    torch.testing.assert_close(f, expected)
    assert same(everything(learn.model), state)
    x = images(3, 64)
    with torch.no_grad(): torch.testing.assert_close(res.fc(features(res, [x[:2], x[2:]])), res(x))
    vit = timm.create_model('vit_tiny_patch16_224', img_size=64).eval()
    with torch.no_grad(): torch.testing.assert_close(vit.head(features(vit, [(x,)])), vit(x))


def trunk(net, x):
    "The map of conv12"
    out = []
    h = net.conv12.register_forward_hook(lambda m, a, o: out.append(o))
    net.eval()(x)
    h.remove()
    return out[0]


def test_features_of_training_images_are_not_augmented(net):
    dls = small()
    with plain_loader(dls.train) as dl: x = [b[0] for b in dl]
    assert sum(map(len, x)) == 60
    torch.testing.assert_close(features(net, dls.train), features(net, x))
    i = [int(o) for o in dls.train.dataset.items].index(17)
    torch.testing.assert_close(features(net, dls.train)[i:i+1], features(net, [seen_items(dls, [i], 0).x]))


def test_neighbours_by_brute_force():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 3, generator=g), torch.randn(2**24//12, 3, generator=g)  # 12 rows in a block
    cosines, idxs = similar(a, b, 3)
    slow = (F.normalize(a) @ F.normalize(b).T).topk(3)
    torch.testing.assert_close(cosines, slow[0])
    torch.testing.assert_close(F.cosine_similarity(a[:, None], b[idxs], dim=2), cosines)
    assert not (similar(a, a, 5)[1] == torch.arange(30)[:, None]).any()
    with raises(ValueError, 'k is 30, but there are 29 images to choose from: take a lower k'): similar(a, a, 30)
    assert similar(a, a, 29)[1].sort(1)[0].tolist() == [[j for j in range(30) if j != i] for i in range(30)]
    with raises(ValueError, 'features have 3 columns, but train_features 2'): similar(a, b[:, :2])
    with raises(ValueError, 'must be a tensor .N, D. of finite numbers'): similar(a*float('nan'), b)


def test_planted_labels_are_found_in_made_up_probabilities():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 1000)
    logits = 3*np.eye(5)[y] + rng.normal(0, 1, (1000, 5))
    p = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    planted = rng.permutation(1000)[:40]
    wrong = y.copy()
    wrong[planted] = (y[planted] + rng.integers(1, 5, 40)) % 5
    table = suspicious_labels(p, wrong)
    assert table['index'][:40].isin(planted).mean() > 0.75 and sorted(table['index']) == [*range(1000)]
    f = torch.from_numpy(np.eye(5)[y] + rng.normal(0, 0.3, (1000, 5)))
    both = suspicious_labels(p, wrong, f)
    assert both['index'][:40].isin(planted).mean() > 0.9  # with the neighbours more
    row = table.iloc[0]
    assert row.margin == p[row['index'], row.label] - np.delete(p[row['index']], row.label).max() == table.margin.min()
    first_of = both.iloc[0]
    near = similar(f, f, 10)[1][int(first_of['index'])].numpy()
    assert first_of.agreement == (wrong[near] == first_of.label).mean()


def test_the_thresholds_of_confident_learning():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.35, 0.65], [0.45, 0.55], [0.2, 0.8]])
    table = suspicious_labels(p, [0, 0, 0, 0, 1]).set_index('index')
    assert table.is_suspect.tolist() == [False]*5  # the threshold of class 1 is 0.8
    table = suspicious_labels(p, [0, 0, 0, 1, 1]).set_index('index').sort_index()
    assert table.is_suspect.tolist() == [False, False, False, False, False] and table.predicted.tolist() == [0, 0, 1, 1, 1]
    table = suspicious_labels(p, [0, 0, 1, 1, 0]).set_index('index').sort_index()  # thresholds: 0.567 and 0.6
    assert table.is_suspect.tolist() == [False, False, False, False, True]


@has_cifar
def test_planted_labels_are_found_among_real_images():
    "Of the 100 most suspicious labels of 1,000, 50 of them planted; the network has errors of its own, 9 in 100"
    full = cifar_dls(os.environ['S9_CIFAR10'], bs=250, seed=0)
    seen = [seen_items(full, range(i, i + 250)) for i in range(0, 1000, 250)]
    net = Net.pretrained()
    with torch.no_grad(): p = torch.cat([net(s.x).softmax(1) for s in seen])
    y = torch.cat([s.y[0] for s in seen]).as_subclass(torch.Tensor)
    planted = torch.arange(0, 1000, 20)
    wrong = y.clone()
    wrong[planted] = (y[planted] + 1 + planted//20 % 9) % 10
    f = features(net, [s.x for s in seen])
    for table in (suspicious_labels(p, wrong), suspicious_labels(p, wrong, f)):
        hits = table['index'].isin(planted.tolist())
        assert hits[:25].mean() >= 0.95 and hits[:50].mean() >= 0.7 and hits[:100].sum() >= 45 and hits[table.is_suspect].sum() >= 42


def test_the_picture_of_similar_images(tmp_path):
    dls = small()
    learn = quiet(s9_learner(dls, model=Net.pretrained()))
    train = features(learn, dls.train)
    fig = plot_similar(learn, 3, train, 4, tmp_path/'s.png')
    cosines, idxs = similar(features(learn, dls.valid), train, 4)
    titles = [ax.get_title().split('\n') for ax in fig.axes]
    assert titles[0] == ['item 3', CLASSES[int(dls.valid.dataset[3][1])]]
    assert [t[1] for t in titles[1:]] == [f'{c:.2f} (item {i})' for c, i in zip(cosines[3], idxs[3])]
    np.testing.assert_allclose(fig.axes[2].images[0].get_array(), seen_items(dls, [int(idxs[3, 1])], 0).images[0])
    other = synth_learner(synth_dls(64))  # loaders without names, and images without any normalization that can be undone
    assert len(plot_similar(quiet(other), 1, features(other, other.dls.train), 2).axes) == 3


def apart(fig):
    "The titles of `fig` do not touch each other"
    fig.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in fig.axes if ax.get_title()]
    return not any(a.overlaps(b) for a, b in combinations(boxes, 2)) and min(b.x0 for b in boxes) >= 0


def test_long_names_are_apart():
    dls = small()
    dls.vocab = [f'{nm}, a class with a name of many words' for nm in CLASSES]
    learn = quiet(s9_learner(dls, model=Net.pretrained()))
    assert apart(plot_cam_mistakes(learn, 2)) and apart(plot_similar(learn, 3, features(learn, dls.train), 3))
    assert '…' in plot_cam(learn, 3).axes[0].get_title()


def test_axes_of_the_user_are_drawn_into(learn):
    fig, axs = plt.subplots(1, 2)
    assert plot_cam(learn, 1, ax=axs[0]) is fig and not axs[1].has_data() and plot_filters(learn, ax=axs[1]) is fig and axs[1].has_data()
    plt.close(fig)


# augmentation

def state_of(dls):
    return [{k: v for k, v in vars(o).items() if not callable(v)} for dl in dls.loaders for o in (dl, *dl.after_item.fs, *dl.after_batch.fs) if hasattr(o, '__dict__')]


@pytest.mark.parametrize('augment', ['item', 'batch'])
def test_versions_are_those_of_the_training(augment):
    dls = small(augment)
    rng = random.getstate(), torch.get_rng_state()
    vars_before = [vars(dl).copy() for dl in dls.loaders]
    found = augmented_items(dls, 11, 2)
    show_augmentations(dls, 11, 2)
    assert (random.getstate(), *[vars(dl) for dl in dls.loaders]) == (rng[0], *vars_before) and torch.equal(torch.get_rng_state(), rng[1])
    for i in range(2):
        for b, (x, _) in enumerate(dls.train):
            if 11 in (places := [int(o) for o in dls.train.places(b)]): seen = x[places.index(11)]
        torch.testing.assert_close(found[i][0][0], seen)
    assert dls.train.epoch == 1


def test_looking_changes_no_later_epoch():
    a, b = small(), small()
    first(a.train), first(b.train)
    show_augmentations(b, 0, 3)
    transforms_apart(b)
    seen_items(b, [4], 0)
    assert torch.equal(first(a.train)[0], first(b.train)[0])
    assert torch.equal(a.train.one_batch()[0], b.train.one_batch()[0])  # its seed comes from a counter of the loader


def image_of(i): return np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)


kinds = {'mask': ((ImageBlock, MaskBlock(['a', 'b'])), lambda i: PILMask.create((image_of(i)[..., 0] > 128).astype(np.uint8))),
         'points': ((ImageBlock, PointBlock), lambda i: [[3, 4], [20, 21]]), 'boxes': ((ImageBlock, BBoxBlock, BBoxLblBlock), [lambda i: [[3, 5, 20, 22]], lambda i: ['cat']])}


def test_small_images_stay_squares_and_names_have_their_place(dls):
    fig = show_augmentations({'ATransformWithAVeryLongName': dls, 'b': dls}, 3, 2)
    fig.draw_without_rendering()
    boxes = [ax.get_window_extent() for ax in fig.axes]
    assert all(im.get_interpolation() == 'nearest' for ax in fig.axes for im in ax.images)
    assert boxes[0].y0 - boxes[3].y1 < 0.15*boxes[0].height  # no gap between the rows
    assert fig.axes[0].texts[0].get_window_extent().x0 >= 0


@pytest.mark.parametrize('kind', kinds)
def test_targets_are_drawn_with_their_image(kind):
    blocks, get_y = kinds[kind]
    block = DataBlock(blocks, get_x=lambda i: PILImage.create(image_of(i)), get_y=get_y, splitter=IndexSplitter([4, 5]), n_inp=1,
                      item_tfms=AlbumentationsTransform(A.Compose([A.HorizontalFlip(p=1)])))
    dls = block.dataloaders(range(6), bs=2, num_workers=0, device='cpu')
    fig = show_augmentations(dls, 1, 2)
    plain, moved = fig.axes[0], fig.axes[1]
    assert len(plain.images) == len(moved.images) == (2 if kind == 'mask' else 1)
    np.testing.assert_array_equal(np.asarray(plain.images[0].get_array())[:, ::-1], np.asarray(moved.images[0].get_array()))
    if kind == 'mask': np.testing.assert_array_equal(np.asarray(plain.images[1].get_array())[:, ::-1], np.asarray(moved.images[1].get_array()))
    if kind == 'points':
        a, b = (ax.collections[0].get_offsets() for ax in (plain, moved))
        np.testing.assert_allclose(np.asarray(a), [[3, 4], [20, 21]], atol=1e-4)
        np.testing.assert_allclose(np.asarray(b)[:, 0] + np.asarray(a)[:, 0], 31, atol=1e-3)
    if kind == 'boxes':
        a, b = (ax.patches[0].get_bbox() for ax in (plain, moved))
        np.testing.assert_allclose([a.x0, a.y0, a.x1, a.y1], [3, 5, 20, 22], atol=1e-3)
        np.testing.assert_allclose([b.x0, b.x1], [32 - a.x1, 32 - a.x0], atol=1e-3)


def test_each_transform_alone():
    for augment in ('item', 'batch'):
        dls = small(augment, 'flip_crop_cutout')
        apart = transforms_apart(dls)
        flip = next(v for k, v in apart.items() if 'Flip' in k)
        plain = seen_items(dls, [2], 0).x
        for x, _ in augmented_items(flip, 2, 3): torch.testing.assert_close(x, plain.flip(-1))
        fig = show_augmentations(apart, 2, 2)
        assert len(fig.axes) == 3*len(apart) and [ax.texts[0].get_text() for ax in fig.axes[::3]] == [*apart]
    with raises(ValueError, 'these loaders have no augmentation: make them with one'): transforms_apart(synth_dls())


def test_transforms_of_fastai_apart():
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: PILImage.create(image_of(i)), get_y=lambda i: i % 2, splitter=IndexSplitter([4, 5]),
                      batch_tfms=[Flip(p=1.), Brightness(p=1.)])
    dls = block.dataloaders(range(6), bs=2, num_workers=0, device='cpu')
    apart = transforms_apart(dls)
    assert [*apart] == ['Flip', 'Brightness']
    plain = seen_items(dls, [1], 0).x
    torch.testing.assert_close(torch.as_tensor(augmented_items(apart['Flip'], 1, 1)[0][0]).as_subclass(torch.Tensor), plain.flip(-1), atol=1e-5, rtol=0)
    assert not torch.allclose(augmented_items(apart['Brightness'], 1, 1)[0][0].as_subclass(torch.Tensor), plain)


def test_augmentations_that_cannot_be_shown(dls):
    with raises(ValueError, 'idx is 2000, but set 0 has the items 0 to 1999: choose one'): show_augmentations(dls, 2000)
    with raises(ValueError, 'n is 0, but must be at least 1'): show_augmentations(dls, 0, 0)
    with raises(ValueError, 'dls is empty: give a DataLoaders'): show_augmentations({})
    assert len(show_augmentations({'a': dls}, 1999, 1).axes) == 2


# runs

@pytest.fixture
def runs(tmp_path, dls):
    for nm, lr, epochs in (('a', 0.05, 3), ('b', 0.1, 2)):
        run = Run(tmp_path/nm, get_recipe('sample', lr=lr), RunOptions())
        run.path.mkdir()
        run.write(dls.source)
        e = np.arange(1, epochs + 1)
        pd.DataFrame(dict(epoch=e, train_loss=2/e, valid_loss=1.8/e, train_accuracy=1 - 0.7/e, valid_accuracy=1 - 0.6/e, lr=lr, time='00:01')).to_csv(run.path/'history.csv', index=False)
    return [tmp_path/'a', tmp_path/'b']


def test_runs_side_by_side(runs, tmp_path):
    found = compare_runs([*runs, EXPERIMENT])
    assert found.settings.to_dict('index') == {'lr': {'a': 0.05, 'b': 0.1}}
    assert found.scores.epochs.tolist() == [3, 2, 100] and found.scores.valid_accuracy.tolist() == [1 - 0.6/3, 1 - 0.6/2, 0.8543]
    assert found.curves.groupby('run').size().to_dict() == {'a': 3, 'b': 2, 'experiment': 100}
    fig = plot_runs([*runs, EXPERIMENT], tmp_path/'runs.png')
    by_label = {ln.get_label(): ln for ln in fig.axes[1].lines}
    np.testing.assert_allclose(by_label['a'].get_ydata(), 100*(1 - 0.6/np.arange(1, 4)))
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['a: 80.00%', 'b: 70.00%', 'experiment: 85.43%']
    assert (tmp_path/'runs.png').stat().st_size > 1000
    assert compare_runs(runs[0]).scores.index.tolist() == ['a']  # one alone


def test_the_log_of_the_experiment():
    log, ours = pd.read_csv(root/'tests/data/s9-log.csv'), pd.read_csv(EXPERIMENT)
    np.testing.assert_allclose(ours.valid_accuracy, log.test_correct/10_000)
    np.testing.assert_allclose(ours.train_accuracy, log.train_accuracy_pct/100)
    np.testing.assert_allclose(ours.valid_loss, log.test_loss)
    np.testing.assert_allclose(ours.lr, [0.05, *log.lr_after_epoch[:-1]])
    assert ours.epoch.tolist() == log.epoch.tolist() and ours.train_loss.isna().all()


def test_runs_that_cannot_be_compared(runs, tmp_path):
    with raises(ValueError, 'given more than once: name each run once'): compare_runs([runs[0], runs[0]])
    with raises(FileNotFoundError, 'no history there; name the folder of a run'): compare_runs([tmp_path])
    (runs[1]/'recipe.json').write_text('{')
    with raises(ValueError, 'recipe.json: not JSON'): compare_runs(runs)
    (runs[0]/'history.csv').write_text('epoch\n')
    with raises(ValueError, 'not a history'): compare_runs(runs[:1])
    other = tmp_path/'x'/'a'
    other.mkdir(parents=True)
    with raises(FileNotFoundError, 'no history there'): compare_runs([other])
    with raises(ValueError, 'histories is empty'): compare_runs([])


def test_many_runs_with_hostile_names():
    e = pd.DataFrame(dict(epoch=[1], train_loss=2., valid_loss=1.8, train_accuracy=0.3, valid_accuracy=0.4, lr=0.05))
    comparison = compare_histories({f'$a_{i}$ "x" {"n"*60}': e for i in range(12)})
    fig = plot_comparison(comparison)
    fig.canvas.draw()
    looks = {(ln.get_color(), ln.get_linestyle()) for ln in fig.axes[2].lines}
    assert len(looks) == 12  # all different
    assert max(len(t.get_text()) for t in fig.legends[0].get_texts()) < 55
