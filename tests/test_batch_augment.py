"The batch path against albumentations: each op's pixels and draws, whole policies, keys, and its manners inside fastai"
import copy
import pickle
import random
import warnings
from dataclasses import replace
from functools import cache
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import IndexSplitter, IntToFloatTensor, Normalize
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorCategory, TensorImage, TensorImageBase, TensorImageBW, TensorMask, set_seed
from fastai.vision.core import TensorBBox, TensorPoint
from fastai.vision.data import ImageBlock, MaskBlock
from scipy.stats import chi2_contingency, ks_2samp
from torch import nn

from s9_fastai.augment.item import AlbumentationsTransform, AlternatingFlip, SubpixelAffine
from s9_fastai.augment.policies import POLICIES, get_policy
from s9_fastai.augment.batch import BatchAugment, read_policy
from s9_fastai.augment.batch_noise import _added
from s9_fastai.augment.batch_ops import LARGE
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.facts import MEAN, SIZE, STD
from s9_fastai.augment.keys import item_key, item_keys, item_seed, mix64, uniforms
import albumentations as A

n_draws = 20_000
constant, replicate, reflect_101 = cv2.BORDER_CONSTANT, cv2.BORDER_REPLICATE, cv2.BORDER_REFLECT_101


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return make()


def turn(**kwargs): return dict(scale=(0.8, 1.2), rotate=(-15, 15), p=1) | kwargs


# name: a transform that hits every image
transforms = {
    'flip': lambda: A.HorizontalFlip(p=1),
    'vertical flip': lambda: A.VerticalFlip(p=1),
    'subpixel, reflect_101': lambda: SubpixelAffine(**turn(translate_percent=(-0.0625, 0.0625), keep_ratio=True, border_mode=reflect_101)),
    'subpixel, replicate': lambda: SubpixelAffine(**turn(translate_percent={'x': (-0.3, 0.1), 'y': 0.1}, border_mode=replicate)),
    'subpixel, no shift': lambda: SubpixelAffine(**turn()), 'subpixel, pixels': lambda: SubpixelAffine(**turn(translate_px=(-3, 5))),
    'subpixel, constant': lambda: SubpixelAffine(**turn(translate_percent=0.2, border_mode=constant)),
    'affine, whole pixels': lambda: A.Affine(**turn(translate_percent=(-0.1, 0.1), border_mode=reflect_101)),
    'affine, pixels': lambda: A.Affine(**turn(translate_px={'x': (-3, 5), 'y': (0, 2)}, fill=77)),
    'affine, far out': lambda: A.Affine(scale=(0.1, 0.3), rotate=(-180, 180), border_mode=reflect_101, p=1),
    'affine, two scales, colour': lambda: A.Affine(scale={'x': (0.5, 2), 'y': (1, 1.5)}, rotate=30, fill=(10, 200, 90), p=1),
    'affine, shift alone': lambda: A.Affine(translate_percent=(-0.2, 0.2), p=1),
    'shift scale rotate': lambda: A.ShiftScaleRotate(shift_limit_x=0.2, shift_limit_y=(0, 0.1), scale_limit=0.1, rotate_limit=45, p=1),
    'erasing': lambda: A.Erasing(fill=(9, 8, 7), fill_mask=3, p=1),
    'one hole': lambda: A.CoarseDropout((1, 1), (16, 16), (16, 16), p=1),
    'holes in pixels, colour': lambda: A.CoarseDropout((1, 4), (2, 9), (1, 20), fill=(125, 123, 114), p=1),
    'holes in parts': lambda: A.CoarseDropout((2, 3), (0.1, 0.4), (0., 0.5), fill=255, p=1),
    'holes larger than the image': lambda: A.CoarseDropout((1, 1), (5, 99), (5, 99), p=1),
    'brightness': lambda: A.RandomBrightnessContrast(p=1),
    'brightness by mean': lambda: A.RandomBrightnessContrast((-0.6, 0.1), (-1, 1.5), brightness_by_max=False, p=1),
    'brightness in a safe range': lambda: A.RandomBrightnessContrast(0.5, (-1.5, 0.5), ensure_safe_range=True, p=1),
    'centre crop': lambda: A.CenterCrop(6, 5),
    'random crop': lambda: A.RandomCrop(6, 5),
    'pad, reflect_101': lambda: A.PadIfNeeded(41, 60, border_mode=reflect_101),
    'pad, replicate': lambda: A.PadIfNeeded(41, 60, border_mode=replicate),
    'pad, colour': lambda: A.PadIfNeeded(41, 60, border_mode=constant, fill=(1, 2, 3)),
    'transpose': lambda: A.Transpose(p=1), 'quarter turns': lambda: A.RandomRotate90(p=1),
    'rotate': lambda: A.Rotate((-70, 20), border_mode=reflect_101, p=1), 'rotate, colour': lambda: A.Rotate(180, fill=(10, 200, 90), fill_mask=3, p=1),
    'grey': lambda: A.ToGray(p=1),
    'blur': lambda: A.GaussianBlur(p=1), 'blur, sizes': lambda: A.GaussianBlur((3, 9), (0.6, 4), p=1),
    'hue, saturation, value': lambda: A.HueSaturationValue(p=1), 'hue alone': lambda: A.HueSaturationValue((10, 170), 0, 0, p=1),
    'jitter': lambda: A.ColorJitter(p=1), 'jitter without hue': lambda: A.ColorJitter((0, 2), (0.1, 1.9), (0, 3), 0, p=1),
    'resize': lambda: A.Resize(24, 41), 'resize, larger': lambda: A.Resize(64, 64), 'resized crop': lambda: A.RandomResizedCrop((24, 30)),
    'resized crop, wide': lambda: A.RandomResizedCrop((16, 16), scale=(0.6, 1), ratio=(1, 2.5)),
    'pad only wide': lambda: A.PadIfNeeded(1, 150, border_mode=reflect_101),
}
by_name = pytest.mark.parametrize('name', transforms)


def fits(t, img): return img.shape[0] == img.shape[1] or not isinstance(t, (A.Transpose, A.RandomRotate90))
def make(name): return quietly(transforms[name])
def twin(t): return read_policy(A.Compose([t]))[0]


def as_drawn(t, par, img):
    "What albumentations drew, as the arguments of the op; one row"
    h, w = img.shape[:2]
    if isinstance(t, A.Affine):
        m, mid = par['matrix'], np.array([w - 1, h - 1])/2
        shift = m[:2, 2] + m[:2, :2] @ mid - mid
        return dict(scale=np.array([[par['scale']['x'], par['scale']['y']]]), shift=shift[None], rotate=np.array([par['rotate']]))
    if isinstance(t, A.CoarseDropout):
        holes = np.zeros((1, t.num_holes_range[1], 4), int)
        holes[0, :len(par['holes'])] = par['holes']
        return dict(holes=holes)
    if isinstance(t, A.Erasing): return dict(holes=par['holes'].reshape(1, -1, 4) if len(par['holes']) else np.zeros((1, 1, 4), int))
    if isinstance(t, A.RandomBrightnessContrast):
        return dict(alpha=np.array([par['alpha']]), beta=np.array([par['beta']])/(255 if t.brightness_by_max else img.mean()))
    if isinstance(t, A.Rotate): return dict(scale=np.ones((1, 2)), shift=np.zeros((1, 2)), rotate=np.rad2deg(np.arctan2(par['matrix'][0, 1], par['matrix'][0, 0]))[None])
    if isinstance(t, A.GaussianBlur):
        k = par['kernel']
        mid = len(k)//2
        return dict(sigma=np.array([(0.5/np.log(k[mid]/k[mid + 1]))**0.5]), size=np.array([len(k)]))
    if isinstance(t, A.HueSaturationValue): return {k: np.array([par[f'{k[:3]}_shift']]) for k in ('hue', 'saturation', 'value')}
    if isinstance(t, A.ColorJitter): return dict(factors=np.array([[par[k] for k in ('brightness', 'contrast', 'saturation', 'hue')]]), order=np.array([par['order']]))
    if isinstance(t, A.RandomRotate90): return dict(quarters=np.array([par['factor']]))
    if isinstance(t, A.RandomResizedCrop):
        x1, y1, x2, y2 = par['crop_coords']
        return dict(box=np.array([[y1, x1, y2 - y1, x2 - x1]]))
    if isinstance(t, A.RandomCrop): return dict(y=np.array([par['crop_coords'][1]]), x0=np.array([par['crop_coords'][0]]))
    return {}


@pytest.fixture(scope='module')
def imgs():
    "Photographs, noise, smooth noise; an odd shape, and one smaller than most holes"
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in [(32, 32, 3)]*40 + [(37, 45, 3)]*10 + [(17, 19, 3)]*10]
    return [*load_cifar('sample').train.images[:60], *noise, *(cv2.GaussianBlur(im, (7, 7), 0) for im in noise)]


@pytest.fixture(scope='module')
def photos(): return np.array(load_cifar('sample').train.images[:128])


def batch(imgs, keys=None):
    "As the loader hands it over: (B, 3, H, W), in memory (B, H, W, 3)"
    x = TensorImage(torch.from_numpy(np.array(imgs)).permute(0, 3, 1, 2))
    if keys is not None: x.keys = keys
    return x


def augment(tfm, imgs, keys=None): return tfm(batch(imgs, keys), split_idx=0)
def back(x): return x.permute(0, 2, 3, 1).numpy()


# --- the same pixels for the same draws

@by_name
def test_pixels_equal_albumentations(name, imgs):
    t, diffs = make(name), []
    op = twin(t)
    for i, img in enumerate(imgs):
        if not fits(t, img): continue
        t.set_random_seed(i)
        ref, x = t(image=img)['image'], torch.from_numpy(img.copy())[None]
        out = op.apply(x, **as_drawn(t, t.params, img))[0].numpy()
        assert (x[0].numpy() == img).all()  # not in place
        assert out.shape == ref.shape and out.dtype == ref.dtype
        diffs.append(abs(out.astype(float) - ref).ravel())
    each, diffs = diffs, np.concatenate(diffs)
    if isinstance(t, (A.Affine, A.Rotate)): assert diffs.max() <= 1 and (diffs > 0).mean() < 1e-3
    elif isinstance(t, (A.Resize, A.RandomResizedCrop)): assert diffs.max() <= 1  # OpenCV computes with 11 bits
    elif isinstance(t, A.GaussianBlur): assert diffs.max() <= 1 and (diffs > 0).mean() < 1e-3
    elif isinstance(t, (A.HueSaturationValue, A.ColorJitter)):  # OpenCV cuts floats in blocks of 32 pixels, and rounds them in the rest of a row
        blocks = np.concatenate([d for d, img in zip(each, imgs) if img.shape[1] == 32])
        assert blocks.max() <= 1 and (blocks > 0).mean() < 1e-3 and diffs.max() <= (1 if isinstance(t, A.HueSaturationValue) else 5)
    elif 'by mean' in name: assert diffs.max() <= 1
    else: assert diffs.max() == 0


masked = {  # besides `transforms`: what becomes of masks
    'affine, class 3': lambda: A.Affine(**turn(translate_percent=0.2, fill_mask=3)), 'pad, class 5': lambda: A.PadIfNeeded(41, 60, border_mode=constant, fill_mask=5),
    'holes, class 2': lambda: A.CoarseDropout((1, 4), (2, 9), (1, 20), fill_mask=2, p=1)}


@pytest.mark.parametrize('dtype', [np.uint8, np.int64])
@pytest.mark.parametrize('name', [*transforms, *masked])
def test_masks_equal_albumentations(name, dtype, imgs):
    t, n_differing, n = quietly((transforms | masked)[name]), 0, 0
    op = twin(t)
    for i, img in enumerate(imgs[::3]):
        if not fits(t, img): continue
        t.set_random_seed(i)
        mask = img[..., 0] // 32
        out = t(image=img, mask=mask)
        m = torch.from_numpy(mask.astype(dtype))[None, ..., None]
        mine = op.apply_mask(m, **as_drawn(t, t.params, img)) if op.marks else m
        assert (m[0, ..., 0].numpy() == mask).all() and mine.dtype == m.dtype and tuple(mine.shape[1:3]) == out['mask'].shape
        n_differing, n = n_differing + (mine[0, ..., 0].numpy() != out['mask']).sum(), n + mask.size
    if isinstance(t, (A.Affine, A.Rotate)): assert n_differing <= n*(0 if int(cv2.__version__[0]) > 4 else 0.005)  # OpenCV 4 rounds coordinates to 1/1024 first
    else: assert n_differing == 0


@pytest.mark.parametrize('name', ['flip', 'subpixel, reflect_101', 'affine, pixels', 'holes in pixels, colour', 'brightness by mean'])
def test_an_op_changes_its_rows_only(name, photos):
    op, x = twin(make(name)), torch.from_numpy(photos[:9])
    rows = np.array([1, 4, 8])
    par = op.draw(uniforms(item_keys(0, 0, rows), op.n), 32, 32)
    out = op.to_rows(x.clone(), rows, **par)
    assert (out[rows] == op.apply(x[rows], **par)).all() and (out[rows] != x[rows]).flatten(1).any(1).all()
    rest = np.setdiff1d(np.arange(9), rows)
    assert (out[rest] == x[rest]).all()


# --- the same distribution of draws

def columns(par):
    "The numbers of some draws, each under a name: edges and sides of holes too"
    par = {k: v.reshape(len(v), -1) for k, v in par.items()}
    if 'holes' in par:
        h = par['holes'].reshape(len(par['holes']), -1, 4)
        sides = h[..., 2:] - h[..., :2]
        par = dict(holes=par['holes'], sides=sides.reshape(len(h), -1), number=(sides > 0).all(-1).sum(1)[:, None])
    return {f'{k} {i}': v[:, i] for k, v in par.items() for i in range(v.shape[1])}


def p_value(a, b):
    "How likely two samples of one distribution differ so much: chi-square for few values, else Kolmogorov-Smirnov"
    values, codes = np.unique(np.concatenate([a, b]).round(9), return_inverse=True)
    if len(values) == 1: return 1.
    if len(values) > 200: return ks_2samp(a, b).pvalue
    counts = np.stack([np.bincount(c, minlength=len(values)) for c in np.split(codes, [len(a)])])
    rare = counts.sum(0) < 20  # chi-square wants no rare values
    counts = np.c_[counts[:, ~rare], counts[:, rare].sum(1)]
    counts = counts[:, counts.sum(0) > 0]
    return chi2_contingency(counts).pvalue


def width(t): return 32 if isinstance(t, A.RandomRotate90) else 40


@cache
def albumentations_draws(name, h=32, n=n_draws):
    t = make(name)
    w = width(t)
    img, drawn = np.full((h, w, 3), 100, np.uint8), []
    t.set_random_seed(0)
    for _ in range(n): drawn.append(as_drawn(t, t.get_params() | t.get_params_dependent_on_data(dict(shape=img.shape), dict(image=img)), img))
    return {k: np.concatenate([d[k] for d in drawn]) for k in drawn[0]}


def batch_draws(op, w=40, h=32, n=n_draws): return op.draw(uniforms(item_keys(0, 0, range(n)), op.n), h, w)


def least_p(ours, theirs):
    a, b = columns(ours), columns(theirs)
    assert list(a) == list(b)
    return min(p_value(a[k], b[k]) for k in a)


drawing = ['subpixel, reflect_101', 'subpixel, replicate', 'affine, whole pixels', 'affine, pixels', 'shift scale rotate', 'one hole',
           'holes in pixels, colour', 'holes in parts', 'holes larger than the image', 'brightness', 'brightness by mean',
           'brightness in a safe range', 'random crop', 'quarter turns', 'rotate', 'resized crop', 'resized crop, wide', 'blur', 'blur, sizes', 'hue, saturation, value',
           'hue alone', 'jitter', 'erasing']


@pytest.mark.parametrize('name', drawing)
def test_draws_are_distributed_as_albumentations(name):
    t = make(name)
    assert least_p(batch_draws(twin(t), width(t)), albumentations_draws(name)) > 1e-4


@pytest.mark.parametrize('name, wrong', [
    ('subpixel, reflect_101', dict(rotate=(-14, 15))), ('subpixel, reflect_101', dict(scale=((0.8, 1.18),)*2)),
    ('affine, whole pixels', dict(unit='side')), ('affine, whole pixels', dict(keep_ratio=True, scale=((0.8, 1.15),)*2)),
    ('affine, pixels', dict(shift=((-3, 5), (0, 3)))), ('one hole', dict(heights=(15, 16))), ('erasing', dict(scale=(0.03, 0.33))), ('erasing', dict(ratio=(0.3, 3))),
    ('holes in pixels, colour', dict(holes=(2, 4))), ('holes in pixels, colour', dict(widths=(1, 19))),
    ('holes in parts', dict(heights=(0.1, 0.39))), ('brightness', dict(contrast=(-0.18, 0.2))),
    ('brightness in a safe range', dict(safe=False)), ('random crop', dict(width=6)), ('rotate', dict(rotate=(-68, 20))), ('resized crop', dict(scale=(0.1, 1))),
    ('resized crop, wide', dict(ratio=(1.1, 2.5))), ('blur', dict(sigma=(0.6, 3))), ('blur, sizes', dict(sizes=(3, 8))), ('hue alone', dict(hue=(10, 165))),
    ('jitter', dict(saturation=(0.8, 1.18)))])
def test_the_comparison_sees_a_wrong_range(name, wrong):
    t = make(name)
    assert least_p(batch_draws(replace(twin(t), **wrong)), albumentations_draws(name)) < 1e-6


@pytest.mark.parametrize('name', drawing)
def test_draws_of_one_image_are_independent_where_albumentations_are(name):
    t = make(name)
    corr = [np.corrcoef([c for c in columns(par).values() if c.std()]) for par in (batch_draws(twin(t), width(t)), albumentations_draws(name))]
    assert corr[0].shape == corr[1].shape and np.abs(corr[0] - corr[1]).max() < 6/n_draws**0.5


@pytest.mark.parametrize('p', [0.3, 0.85, 1, 0])
def test_probabilities_of_policy_and_transforms_multiply(p):
    pipe = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.2), A.Affine(rotate=5, p=1), A.CoarseDropout(p=0)], p=p)
    hit = np.zeros((4, n_draws), bool)
    for row, par in zip(hit, BatchAugment.from_compose(pipe).draw(item_keys(1, 0, range(n_draws)), 32, 32)): row[par['rows']] = True
    for rate, q in zip(hit.mean(1), (0.5*p, 0.2*p, p, 0)): assert abs(rate - q) <= 4*(q*(1 - q)/n_draws)**0.5
    both = 0.5*0.2*p  # of the images that are augmented at all, each transform chooses for itself
    assert abs((hit[0] & hit[1]).mean() - both) <= 4*(both*(1 - both)/n_draws)**0.5
    img, flips = np.arange(12, dtype=np.uint8).reshape(2, 2, 3), A.Compose(pipe.transforms[:2], p=p)  # albumentations means the same
    flips.set_random_state(np.random.default_rng(0), random.Random(0))  # one generator: with seed=0 each transform has its own, all alike
    theirs = np.mean([(flips(image=img)['image'] != img).any() for _ in range(4000)])
    assert abs(theirs - (hit[0] | hit[1]).mean()) <= 5*0.5/4000**0.5


@pytest.mark.parametrize('pipe', [A.OneOf([A.HorizontalFlip(p=0.6), A.VerticalFlip(p=0.2), A.Transpose(p=0)], p=0.7),
                                  A.SomeOf([A.HorizontalFlip(p=1), A.VerticalFlip(p=0.5), A.Transpose(p=0.8)], n=2, p=0.9)], ids=['OneOf', 'SomeOf'])
def test_choices_are_as_frequent_as_in_albumentations(pipe):
    n, img = 8000, np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    whole = A.Compose([pipe])
    whole.set_random_state(np.random.default_rng(0), random.Random(0))
    theirs = [whole(image=img)['image'].tobytes() for _ in range(n)]
    ours = [o.tobytes() for o in back(augment(BatchAugment.from_compose(whole), [img]*n, item_keys(0, 0, range(n))))]
    kinds = sorted({*ours, *theirs})
    assert len(kinds) > 2 and chi2_contingency([[o.count(k) for k in kinds] for o in (ours, theirs)]).pvalue > 1e-4


@pytest.mark.parametrize('t, message', [(A.OneOf([A.Resize(8, 8), A.HorizontalFlip()]), 'Resize in OneOf is for some images only, .* put it outside of OneOf'),
                                        (A.SomeOf([A.ToTensorV2(), A.HorizontalFlip()], n=1), 'ToTensorV2 in SomeOf is for some images only'),
                                        (A.OneOf([]), r'OneOf: transforms is \[\], but .* must be at least one: leave it out'),
                                        (A.SomeOf([AlternatingFlip(), A.VerticalFlip()], n=1), 'must be without AlternatingFlip: use HorizontalFlip in it')])
def test_choices_without_a_twin_are_refused(t, message):
    with pytest.raises(ValueError, match=message): BatchAugment.from_compose(A.Compose([t]))


def test_masks_move_with_the_choice_of_their_image(photos):
    pipe = A.Compose([A.OneOf([A.HorizontalFlip(p=1), A.Transpose(p=1)]), A.SomeOf([A.VerticalFlip(p=1), A.RandomRotate90(p=1)], n=1)])
    x, y = BatchAugment.from_compose(pipe)((batch(photos, item_keys(0, 0, range(128))), TensorMask(torch.from_numpy(photos[..., 0]).long())), split_idx=0)
    assert (x[:, 0].as_subclass(torch.Tensor) == y.as_subclass(torch.Tensor)).all() and (back(x) != photos).any()


def test_chosen_images_are_chosen_apart():
    hit = np.zeros((5, n_draws))
    for row, par in zip(hit, BatchAugment.from_compose(get_policy('reference', SIZE, MEAN)).draw(item_keys(0, 0, range(n_draws)), 32, 32)): row[par['rows']] = 1
    for rate, p in zip(hit.mean(1), (0.3, 0.5, 0.5, 0.2, 1)): assert abs(rate - p) <= 4*(p*(1 - p)/n_draws)**0.5
    assert abs(np.corrcoef(hit[:4]) - np.eye(4)).max() < 4/n_draws**0.5


# --- whole policies

def applied(t, img, mine):
    "albumentations' own `apply` of the transform `t` to one image, with the batch's draws for it"
    h, w = img.shape[:2]
    if isinstance(t, A.Affine):
        a, mid = np.deg2rad(mine['rotate']), np.array([w - 1, h - 1])/2
        m = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])*mine['scale']
        m = np.r_[np.c_[m, mid + mine['shift'] - m @ mid], [[0, 0, 1]]]
        return t.apply(img, matrix=m, output_shape=(h, w))
    if isinstance(t, A.CoarseDropout): return t.apply(img, holes=mine['holes'], seed=0)
    if isinstance(t, A.RandomBrightnessContrast): return t.apply(img, alpha=mine['alpha'], beta=255*mine['beta'])
    if isinstance(t, A.RandomCrop): return img[mine['y']:, mine['x0']:][:t.height, :t.width]
    if isinstance(t, A.RandomRotate90): return t.apply(img, factor=mine['quarters'])
    if isinstance(t, A.RandomResizedCrop):
        top, left, h, w = mine['box']
        return t.apply(img, crop_coords=(left, top, left + w, top + h))
    return t(image=img, force_apply=True)['image']


def one(par, i):
    "The parameters of image `i`, or None if it is not hit"
    at = np.flatnonzero(par['rows'] == i)
    if not len(at): return None
    if 'drawn' in par: return [one(o, at[0]) for o in par['drawn']]  # of each transform of a choice
    return {k: v[at[0]] for k, v in par.items() if k != 'rows'}


def applied_in(pipe, img, pars):
    for t, mine in zip(pipe.transforms, pars):
        if mine is None: continue
        img = applied_in(t, img, mine) if isinstance(t, A.BaseCompose) else applied(t, img, mine)
    return img


def one_by_one(pipe, op_draws, imgs):
    "The plain, slow reference: albumentations image by image, with the batch's draws"
    return np.stack([applied_in(pipe, img, [one(par, i) for par in op_draws]) for i, img in enumerate(imgs)])


def pad_crop_flip():
    return A.Compose([A.PadIfNeeded(40, 40, border_mode=reflect_101), A.RandomCrop(32, 32), A.HorizontalFlip(p=0.5)])


policies = {**{nm: lambda nm=nm: get_policy(nm, SIZE, MEAN) for nm in POLICIES}, 'pad, crop, flip': pad_crop_flip,
            'turns': lambda: A.Compose([A.RandomRotate90(p=0.7), A.Transpose(p=0.5), A.ToGray(p=0.2), A.Resize(40, 36), A.RandomCrop(32, 32)]),
            'one of': lambda: A.Compose([A.OneOf([A.HorizontalFlip(p=1), A.RandomRotate90(p=0.5), A.CoarseDropout(p=2/3), A.RandomBrightnessContrast(p=0.3)], p=0.8), A.VerticalFlip(p=0.5)]),
            'some of': lambda: A.Compose([A.SomeOf([A.HorizontalFlip(p=1), A.CoarseDropout(p=0.7), A.Transpose(p=0.5), A.OneOf([A.VerticalFlip(p=1), A.ToGray(p=1)], p=0.5)], n=2, p=0.9)])}


@pytest.mark.parametrize('name', policies)
@pytest.mark.parametrize('layout', ['channels last', 'contiguous', 'slice'])
def test_a_batch_is_the_policy_applied_one_by_one(name, layout, photos):
    pipe = policies[name]()
    tfm, keys = BatchAugment.from_compose(pipe), item_keys(3, 1, range(128))
    x = batch(photos, keys)
    if layout == 'contiguous': x = TensorImage(torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous())
    if layout == 'slice': x = TensorImage(torch.from_numpy(np.repeat(photos, 2, 2)).permute(0, 3, 1, 2)[..., ::2])
    x.keys = keys
    before = x.clone()
    out, ref = tfm(x, split_idx=0), one_by_one(pipe, tfm.draw(keys, 32, 32), photos)
    assert (x == before).all() and out.is_contiguous(memory_format=torch.channels_last) and not hasattr(out, 'keys')
    assert out.data_ptr() != x.data_ptr()
    diff = abs(back(out).astype(int) - ref)
    assert out.shape == (128, 3, 32, 32) and diff.max() <= 2 and (diff > 0).mean() < (0.2 if name in ('turns', 'resized_crop') else 1e-3)  # OpenCV resizes with 11 bits


@pytest.mark.parametrize('name', policies)
def test_masks_of_a_batch_move_with_its_images(name, photos):
    "A mask that is a channel of its image stays one: with nearest neighbours as images are, where nothing is interpolated; else it has the pixels of the op alone"
    pipe, keys = policies[name](), item_keys(3, 1, range(128))
    if name in ('one of', 'some of'): pytest.skip('of a choice')
    still = [t for t in pipe.transforms if not isinstance(t, (A.Affine, A.RandomBrightnessContrast, A.CoarseDropout, A.ToGray, A.Resize, A.RandomResizedCrop))]
    tfm = BatchAugment.from_compose(A.Compose(still))
    mask = TensorMask(torch.from_numpy(photos[..., 0]))
    before = mask.clone()
    x, y = tfm((batch(photos, keys), mask), split_idx=0)
    assert type(y) is TensorMask and (y == x[:, 0].as_subclass(torch.Tensor)).all() and (mask == before).all()
    whole = BatchAugment.from_compose(pipe)
    x, y = whole((batch(photos, keys), mask), split_idx=0)
    assert (x == whole(batch(photos, keys), split_idx=0)).all() and y.shape == x[:, 0].shape  # masks change no draw
    ref = torch.from_numpy(photos[..., :1])
    for op, par in zip(whole.ops, whole.draw(keys, 32, 32)):
        if op.moves: ref = op.to_rows(ref.clone(), are_masks=True, **par)
    assert (y == ref[..., 0]).all()


def test_masks_in_a_datablock(photos):
    def image(i): return photos[i]
    def mask(i): return photos[i][..., 0]
    def dls(workers, bs=16):
        set_seed(0)
        pipe = A.Compose([A.HorizontalFlip(p=0.5), A.PadIfNeeded(40, 40), A.RandomCrop(32, 32)])
        dblock = DataBlock((ImageBlock, MaskBlock), get_items=lambda _: range(64), get_x=image, get_y=mask, splitter=IndexSplitter(range(8)), batch_tfms=BatchAugment.from_compose(pipe))
        return dblock.dataloaders(None, bs=bs, num_workers=workers, device='cpu')
    first, second = ([(x, y) for x, y in dls(0).train] for _ in range(2))
    for (x, y), (x2, y2), (x3, y3) in zip(first, second, dls(2).train):
        assert ((255*x[:, 0]).round() == y).all() and (x == x2).all() and (y == y2).all() and (x == x3).all() and (y == y3).all()
    for x, y in dls(0).valid: assert ((255*x[:, 0]).round() == y).all() and (y[0] == torch.from_numpy(mask(0))).all()


def test_masks_of_another_size_are_refused(photos):
    tfm = BatchAugment.from_compose(A.Compose([A.HorizontalFlip()]))
    with pytest.raises(ValueError, match=r'the masks are \(128, 16, 32\), but the images \(128, 3, 32, 32\): give both one size with Resize'):
        tfm((batch(photos), TensorMask(torch.zeros(128, 16, 32))), split_idx=0)


def test_both_paths_agree_in_the_mean(photos):
    "Mean and spread of every pixel over many draws: order and frequency of the transforms are those of the item path"
    n, img = 6000, photos[5]
    item = AlbumentationsTransform(get_policy('reference', SIZE, MEAN))
    def one(i):
        token = item_key.set(item_seed(0, 0, i))
        try: return item(img, split_idx=0)
        finally: item_key.reset(token)
    a = np.stack([one(i) for i in range(n)]).astype(np.float32)
    b = back(augment(BatchAugment.from_compose(get_policy('reference', SIZE, MEAN)), np.repeat(img[None], n, 0), item_keys(0, 0, range(n)))).astype(np.float32)
    z = (a.mean(0) - b.mean(0))/(a.var(0)/n + b.var(0)/n)**0.5
    spread = abs(a.std(0)/b.std(0) - 1)
    assert abs(z).max() < 5.5 and z.std() < 2 and spread.mean() < 0.03 and spread.max() < 0.2


# --- keys

def test_keys_depend_on_all_their_parts_and_never_collide():
    parts = [(s, e, n) for s in (0, 1, 2**63) for e in range(5) for n in range(3)]
    keys = np.concatenate([item_keys(s, e, range(5000), n) for s, e, n in parts])
    assert keys.dtype == np.uint64 and len(np.unique(keys)) == len(parts)*5000
    assert (item_keys(0, 0, np.array([4, 2]), [0, 1]) == [item_keys(0, 0, [4])[0], item_keys(0, 0, [2], 1)[0]]).all()
    assert item_keys(0, 0, np.int32(7)).shape == (1,) and item_keys(0, 0, []).shape == (0,)


def test_keys_are_the_same_on_every_machine():
    assert [hex(k) for k in item_keys(42, 3, [0, 49_999], [0, 1])] == ['0xbe54cce06dd8abf8', '0xf1bf702c91b093b0']
    np.testing.assert_array_equal(mix64(np.array([0, 1, 2**63], np.uint64)), mix64_plain([0, 1, 2**63]))


def mix64_plain(zs):
    "splitmix64's finaliser in Python's whole numbers"
    out = []
    for z in zs:
        z = (z ^ z >> 30)*0xbf58476d1ce4e5b9 % 2**64
        z = (z ^ z >> 27)*0x94d049bb133111eb % 2**64
        out.append(z ^ z >> 31)
    return np.array(out, np.uint64)


@pytest.mark.parametrize('across', ['idx', 'epoch', 'seed', 'nth', 'column'])
def test_uniform_numbers_look_random(across):
    n = 40_000
    keys = {'idx': lambda: item_keys(0, 0, range(n)), 'epoch': lambda: np.concatenate([item_keys(0, e, [5]) for e in range(n)]),
            'seed': lambda: np.concatenate([item_keys(s, 0, [5]) for s in range(n)]), 'nth': lambda: item_keys(0, 0, np.full(n, 5), range(n)),
            'column': lambda: item_keys(0, 0, [5])}[across]()
    u = uniforms(keys, n).reshape(n, 1) if across == 'column' else uniforms(keys, 6)
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == u.size
    assert abs(u.mean(0) - 0.5).max() < 4*(1/12/n)**0.5 and abs(u.var(0) - 1/12).max() < 4*(1/180/n)**0.5
    lagged = np.c_[u[:-1], u[1:]] if u.shape[1] > 1 else np.stack([u[i:n-8+i, 0] for i in range(8)], 1)
    corr = np.corrcoef(lagged.T)
    assert abs(corr - np.eye(len(corr))).max() < 4.5/n**0.5
    pairs = np.histogram2d(u[:-1, 0], u[1:, 0], bins=16)[0]
    assert abs(((pairs - pairs.mean())**2/pairs.mean()).sum() - 255) < 5*(2*255)**0.5


def test_a_stream_can_be_entered_anywhere():
    keys = item_keys(0, 0, range(9))
    np.testing.assert_array_equal(uniforms(keys, 4, first=3), uniforms(keys, 7)[:, 3:])


def test_a_key_decides_alone(photos):
    tfm, keys = BatchAugment.from_compose(get_policy('reference', SIZE, MEAN)), item_keys(0, 0, range(128))
    first = augment(tfm, photos, keys)
    order = np.random.default_rng(1).permutation(128)
    assert (augment(tfm, photos[order], keys[order]) == first[order]).all()
    for size in (1, 7): assert (torch.cat([augment(tfm, photos[i:i+size], keys[i:i+size]) for i in range(0, 128, size)]) == first).all()
    for twin in (copy.deepcopy(tfm), pickle.loads(pickle.dumps(tfm))): assert (augment(twin, photos, keys) == first).all()
    other = augment(tfm, photos, item_keys(0, 1, range(128)))
    assert (other != first).flatten(1).any(1).float().mean() > 0.75


def test_equal_images_of_a_batch_become_different(photos):
    tfm = BatchAugment.from_compose(A.Compose([A.RandomBrightnessContrast(p=1), SubpixelAffine(translate_percent=0.1, rotate=(-20, 20), p=1)]))
    out = augment(tfm, np.repeat(photos[:1], 128, 0), item_keys(0, 0, range(128)))
    assert len({im.numpy().tobytes() for im in out}) == 128


def test_without_keys_pythons_random_decides(photos):
    tfm = BatchAugment.from_compose(get_policy('reference', SIZE, MEAN))
    set_seed(3)
    a, b = augment(tfm, photos), augment(tfm, photos)
    set_seed(3)
    assert (augment(tfm, photos) == a).all() and (a != b).any()


@pytest.mark.parametrize('shape', [(32, 32, 3), (5, 7, 3), (9, 9, 1), (8, 3, 4)])
def test_any_size_and_number_of_channels(shape):
    imgs = np.random.default_rng(0).integers(0, 256, (40, *shape), dtype=np.uint8)
    pipe = A.Compose([SubpixelAffine(rotate=20, translate_percent=(-0.1, 0.1), border_mode=reflect_101, p=0.5), A.HorizontalFlip(p=0.5),
                      A.CoarseDropout((1, 2), (0.1, 0.5), (0.1, 0.5), p=0.5), A.RandomBrightnessContrast(p=0.5)])
    tfm, keys = BatchAugment.from_compose(pipe), item_keys(0, 0, range(40))
    ref = one_by_one(pipe, tfm.draw(keys, *shape[:2]), imgs)
    diff = abs(back(augment(tfm, imgs, keys)).astype(int) - ref.reshape(imgs.shape))
    assert diff.max() <= 2 and (diff > 0).mean() < 2e-3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
@pytest.mark.parametrize('name', policies)
def test_a_gpu_gives_the_same(name, photos):
    tfm, keys = BatchAugment.from_compose(policies[name]()), item_keys(0, 0, range(128))
    out = tfm(batch(photos, keys).to('cuda'), split_idx=0)
    assert out.device.type == 'cuda'
    diff = abs(out.cpu().float() - augment(tfm, photos, keys).float())
    assert diff.max() <= 2 and (diff > 1e-4).float().mean() < 1e-2


# --- what is refused

class MyFlip(A.HorizontalFlip):
    def apply(self, img, **params): return img


@pytest.mark.parametrize('make, message', [
    (lambda: A.RandomGamma(), 'RandomGamma of albumentations.* is not supported on whole batches; supported are: Affine, SubpixelAffine, '),
    (lambda: A.OneOrOther(A.HorizontalFlip(), A.VerticalFlip()), 'OneOrOther of albumentations'),
    (lambda: A.Sequential([A.HorizontalFlip()]), 'Sequential of albumentations'),
    (lambda: A.RandomOrder([A.HorizontalFlip()], n=1), 'RandomOrder of albumentations'),
    (lambda: A.OneOf([A.Sequential([A.HorizontalFlip()])]), 'Sequential of albumentations'),
    (lambda: A.SomeOf([A.HorizontalFlip()], n=1, replace=True), 'SomeOf: replace is True, but'),
    (lambda: A.Compose([A.HorizontalFlip()]), 'Compose of albumentations'),
    (lambda: MyFlip(), f'MyFlip of {__name__} is not supported on whole batches'),
    (lambda: type('Affine', (A.Affine,), {'__module__': 'mine'})(), 'Affine of mine is not supported on whole batches'),
    (lambda: A.Affine(shear=(0, 5)), r"Affine: shear is \{'x': \(0.0, 5.0\), 'y': \(0.0, 5.0\)\}, but on whole batches it must be 0"),
    (lambda: A.Affine(interpolation=cv2.INTER_CUBIC), 'Affine: interpolation is 2, but .* must be cv2.INTER_LINEAR'),
    (lambda: A.Affine(border_mode=cv2.BORDER_WRAP), 'Affine: border_mode is 3, but .* must be cv2.BORDER_CONSTANT, '),
    (lambda: A.Affine(border_mode=cv2.BORDER_REFLECT), 'Affine: border_mode is 2, but'),
    (lambda: A.Affine(fit_output=True), 'Affine: fit_output is True, but .* must be False'),
    (lambda: A.Affine(balanced_scale=True), 'Affine: balanced_scale is True, but .* must be False'),
    (lambda: A.Affine(scale=(0, 1)), 'Affine: scale is .* must be above 0'),
    (lambda: A.Affine(fill=(0.5, 0, 0)), 'Affine: fill is .* must be whole numbers from 0 to 255'),
    (lambda: A.Affine(fill=-1), 'Affine: fill is -1.0, but .* must be from 0 to 255: give such numbers'),
    (lambda: A.ShiftScaleRotate(interpolation=0), 'ShiftScaleRotate: interpolation is 0, but'),
    (lambda: A.CoarseDropout(fill='random'), "CoarseDropout: fill is 'random', but .* must be whole numbers"),
    (lambda: A.CoarseDropout(fill='inpaint_ns'), "CoarseDropout: fill is 'inpaint_ns', but"),
    (lambda: A.CoarseDropout(fill=300), 'CoarseDropout: fill is 300.0, but .* must be from 0 to 255: give such numbers'),
    (lambda: A.CoarseDropout(hole_height_range=(4, 8)), 'CoarseDropout: hole_width_range is .* in pixels or in parts'),
    (lambda: A.CoarseDropout(max_holes=1), 'CoarseDropout has no argument max_holes'),
    (lambda: A.RandomBrightnessContrast(brightness_by_max=False, ensure_safe_range=True), 'brightness_by_max is False, but'),
    (lambda: A.RandomCrop(8, 8, pad_if_needed=True), 'RandomCrop: pad_if_needed is True, but .*put a PadIfNeeded before it'),
    (lambda: A.RandomCrop(8, 8, p=0.5), 'RandomCrop: p is 0.5, but .* must be 1, as all images of a batch have one size'),
    (lambda: A.CenterCrop(8, 8, p=0.5), 'CenterCrop: p is 0.5'),
    (lambda: A.PadIfNeeded(40, 40, p=0.5), 'PadIfNeeded: p is 0.5'),
    (lambda: A.PadIfNeeded(40, 40, position='random'), "PadIfNeeded: position is 'random', but .* must be 'center'"),
    (lambda: A.PadIfNeeded(None, 40, pad_height_divisor=8), 'PadIfNeeded: pad_height_divisor is 8, but .* must be None'),
    (lambda: A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_WRAP), 'PadIfNeeded: border_mode is 3'),
])
def test_what_has_no_twin_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as e: BatchAugment.from_compose(A.Compose([quietly(make)]))
    item_by_item = "augment item by item instead, with AlbumentationsTransform (augment='item')" in str(e.value)
    assert item_by_item != any(o in str(e.value) for o in ('has no argument', 'give it p=1', 'give such numbers'))
    if item_by_item:  # the remedy works
        tfm = AlbumentationsTransform(A.Compose([quietly(make)]))
        for _ in range(5): assert quietly(lambda: tfm(np.full((16, 16, 3), 90, np.uint8), split_idx=0)).dtype == np.uint8


@pytest.mark.parametrize('t', [A.Normalize(MEAN, STD), A.Normalize(normalization='image'), A.ToFloat(), A.FromFloat()], ids=lambda t: type(t).__name__)
def test_what_would_scale_training_images_alone_is_refused(t):
    for pipe in ([t], [A.HorizontalFlip(), t, A.ToTensorV2()]):
        with pytest.raises(ValueError, match=f"go through {type(t).__name__}.*through no Normalize.*put fastai's Normalize"): BatchAugment.from_compose(A.Compose(pipe))


@pytest.mark.parametrize('make, message', [
    (lambda: A.Compose([], bbox_params=A.BboxParams('coco')), 'Compose has bbox_params, but only images and their masks go through on whole batches: leave that out, or augment item'),
    (lambda: A.Compose([], keypoint_params=A.KeypointParams('xy')), 'Compose has keypoint_params'),
    (lambda: A.Compose([], additional_targets={'image2': 'image'}), 'additional_targets'),
    (lambda: A.ReplayCompose([]), 'ReplayCompose must be a plain A.Compose'),
    (lambda: A.Sequential([]), 'Sequential must be a plain A.Compose'),
    (lambda: A.Compose([A.RandomCrop(8, 8)], p=0.5), 'p of Compose is 0.5, but with RandomCrop it must be 1'),
    (lambda: A.Compose([A.Normalize()], p=0.5), 'Normalize is for some images only'),
    (lambda: A.Compose([A.ToTensorV2(), A.HorizontalFlip()]), 'ToTensorV2 must end a policy'),
])
def test_compositions_that_mean_something_else_are_refused(make, message):
    with pytest.raises(ValueError, match=message): BatchAugment.from_compose(quietly(make))


@pytest.mark.parametrize('bad', [A.HorizontalFlip(), [A.HorizontalFlip()], None])
def test_only_compositions(bad):
    with pytest.raises(TypeError, match='a pipeline must be an A.Compose'): BatchAugment.from_compose(bad)


@pytest.mark.parametrize('pipe, message', [
    (A.Compose([A.RandomCrop(40, 20)]), 'the crop is 40x20, but the images are 32x32: put a PadIfNeeded'),
    (A.Compose([A.CenterCrop(33, 20)]), 'the crop is 33x20'),
    (A.Compose([A.CoarseDropout((1, 1), (40, 50), (8, 8), p=1)]), 'a hole has 40 pixels or more, but the images 32: give smaller holes'),
    (A.Compose([A.Affine(rotate=5, fill=(1, 2), p=1)]), r'fill is \(1, 2\), but the images have 3 channels'),
    (A.Compose([A.CoarseDropout(fill=(1, 2), p=1)]), r'fill is \(1, 2\), but the images have 3 channels')])
def test_images_that_do_not_fit_the_policy_are_refused(pipe, message, photos):
    with pytest.raises(ValueError, match=message): quietly(lambda: augment(BatchAugment.from_compose(pipe), photos))


@pytest.mark.parametrize('x, error, message', [
    (TensorImage(torch.zeros(2, 3, 8, 8)), ValueError, r'uint8 \(B, C, H, W\), got torch.float32 \(2, 3, 8, 8\): put it among the batch_tfms, before'),
    (TensorImage(torch.zeros(3, 8, 8, dtype=torch.uint8)), ValueError, r'got torch.uint8 \(3, 8, 8\)'),
    (TensorImage(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)), ValueError, r'got torch.uint8 \(0, 3, 8, 8\)'),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, 'takes a TensorImage .* got Tensor: use TensorImage'),
    (TensorImageBase(torch.zeros(2, 3, 8, 8)), TypeError, 'got TensorImageBase'), (np.zeros((2, 8, 8, 3), np.uint8), TypeError, 'got ndarray'),
    (TensorCategory(3), TypeError, 'got TensorCategory'), ([1], TypeError, 'got list'), (None, TypeError, 'got NoneType'), ((), TypeError, 'got tuple')],
    ids=lambda x: type(x).__name__ if not isinstance(x, (str, type)) else '')
@pytest.mark.parametrize('as_batch', [False, True])
def test_batches_it_cannot_augment_are_refused(x, error, message, as_batch):
    with pytest.raises(error, match=message): BatchAugment([])((x, TensorCategory(1)) if as_batch else x, split_idx=0)


in_places = [TensorMask(torch.zeros(128, 3, 32, 32)), TensorPoint(torch.zeros(128, 1, 2)), TensorBBox(torch.zeros(128, 1, 4)),
             TensorImage(torch.zeros(128, 3, 32, 32)), torch.zeros(128, 5, 2)]


@pytest.mark.parametrize('y', in_places, ids=lambda y: type(y).__name__)
def test_targets_in_places_are_refused_by_the_name_of_the_op_that_moves_images(y, photos):
    for pipe, names in (([A.HorizontalFlip()], 'BatchFlip'), ([A.RandomBrightnessContrast(), A.Affine(), A.CoarseDropout()], 'BatchAffine'),
                        ([A.PadIfNeeded(40, 40), A.RandomCrop(32, 32), A.VerticalFlip(p=0)], 'BatchPad, BatchCrop')):
        with pytest.raises(TypeError, match=f'BatchAugment: {names} would move the image, but not its {type(y).__name__}: take {names} out'):
            BatchAugment.from_compose(A.Compose(pipe))((batch(photos), 3, y), split_idx=0)


@pytest.mark.parametrize('y', in_places, ids=lambda y: type(y).__name__)
def test_targets_in_places_pass_where_colours_change(y, photos):
    for pipe in (A.Compose([A.RandomBrightnessContrast(p=1), A.CoarseDropout(p=1), A.HorizontalFlip(p=0)]), A.Compose([A.HorizontalFlip()], p=0), A.Compose([])):
        out = BatchAugment.from_compose(pipe)((batch(photos), 3, y), split_idx=0)
        assert out[1] == 3 and out[2] is y and (len(pipe) != 3 or (out[0] != batch(photos)).any())


@pytest.mark.parametrize('y', [TensorCategory(torch.arange(128)), TensorCategory(torch.zeros(128, 4, 10)), torch.rand(128), torch.rand(128, 7), 3, None, 'cat'], ids=lambda y: type(y).__name__)
def test_other_targets_stay_as_they_are(y, photos):
    out = BatchAugment.from_compose(get_policy('reference', SIZE, MEAN))((batch(photos), y), split_idx=0)
    assert type(out) is tuple and out[1] is y


def test_keys_of_another_batch_are_refused(photos):
    with pytest.raises(ValueError, match='128 keys for 5 images'): BatchAugment([])(batch(photos, item_keys(0, 0, range(128)))[:5], split_idx=0)


# --- inside fastai

def test_types(photos):
    tfm = BatchAugment.from_compose(get_policy('reference', SIZE, MEAN))
    assert type(augment(tfm, photos)) is TensorImage
    grey = TensorImageBW(torch.from_numpy(photos[..., :1]).permute(0, 3, 1, 2))
    assert type(BatchAugment.from_compose(A.Compose([A.HorizontalFlip()]))(grey, split_idx=0)) is TensorImageBW
    x = batch(photos)
    for split_idx in (None, 1): assert tfm(x, split_idx=split_idx) is x and tfm((x, 1), split_idx=split_idx)[0] is x


def test_repr_names_the_ops():
    s = repr(BatchAugment.from_compose(get_policy('reference', SIZE, MEAN)))
    assert s.startswith('BatchAugment([BatchAffine(scale=((0.8, 1.2), (0.8, 1.2)), shift=((-0.0625, 0.0625), ') and 'BatchFlip' in s


def get_image(i): return TensorImage(torch.full((3, 8, 8), 100, dtype=torch.uint8))
def get_label(i): return i % 2


def datablock(tfm):
    return DataBlock(blocks=(TransformBlock(batch_tfms=IntToFloatTensor), CategoryBlock), get_x=get_image, get_y=get_label,
                     splitter=IndexSplitter(range(64, 80)), batch_tfms=[Normalize.from_stats(MEAN, STD), tfm])


@pytest.mark.parametrize('num_workers', [0, 2])
def test_in_a_datablock_it_follows_set_seed_and_leaves_validation_alone(num_workers):
    def epoch(seed):
        set_seed(seed)
        dls = datablock(BatchAugment.from_compose(A.Compose([A.RandomBrightnessContrast(p=1)]))).dataloaders(
            range(80), bs=16, num_workers=num_workers, device='cpu')
        valid = torch.cat([x for x, _ in dls.valid])
        assert torch.allclose(valid*torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None], torch.tensor(100/255), atol=1e-6)
        return torch.cat([x for x, _ in dls.train])[:, 0, 0, 0]
    first = epoch(1)
    assert len(first.unique()) > 30 and (epoch(1) == first).all() and (epoch(2) != first).any()


def test_show_batch_and_export(tmp_path, photos):
    import matplotlib
    matplotlib.use('agg')
    tfm = BatchAugment.from_compose(get_policy('reference', SIZE, MEAN))
    big = datablock(BatchAugment.from_compose(A.Compose([A.HorizontalFlip(), A.CoarseDropout()])))
    dls = big.dataloaders(range(80), bs=16, device='cpu')
    dls.show_batch(max_n=4)
    assert [*map(type, dls.train.after_batch.fs)] == [BatchAugment, IntToFloatTensor, Normalize]
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    with learn.no_logging(): learn.fit(1)
    learn.export('m.pkl')
    loaded = quietly(lambda: load_learner(tmp_path/'m.pkl'))
    assert 'BatchFlip' in repr(next(t for t in loaded.dls.train.after_batch.fs if isinstance(t, BatchAugment)))
    keys = item_keys(0, 0, range(128))
    assert (augment(pickle.loads(pickle.dumps(tfm)), photos, keys) == augment(tfm, photos, keys)).all()


@pytest.mark.parametrize('ops', [A.Compose([A.HorizontalFlip()]), A.HorizontalFlip(), [A.HorizontalFlip()], [print], 3], ids=str)
def test_what_is_no_batch_op_is_refused_with_the_call_that_was_meant(ops):
    with pytest.raises(TypeError, match=r'is no BatchOp: give BatchAugment.from_compose\(A.Compose'): BatchAugment(ops)
    assert BatchAugment.from_compose(A.Compose([A.HorizontalFlip()])).ops


@pytest.mark.parametrize('p', [-0.1, 1.1, True, '1', None])
def test_a_probability_of_no_use(p):
    with pytest.raises(ValueError, match=f'p is {p!r}, but must be (a number, )?0 to 1'): BatchAugment([], p=p)


# --- quarter turns and sizes

@pytest.mark.parametrize('t', [A.Transpose(p=0.5), A.RandomRotate90()], ids=lambda t: type(t).__name__)
def test_quarter_turns_need_square_images(t, photos):
    oblong = photos[:, :24]
    with pytest.raises(ValueError, match='exchanges height and width, but the images of a batch are 24x32: put a Resize or a crop to a square before it'):
        augment(BatchAugment.from_compose(A.Compose([t])), oblong)
    assert quietly(lambda: augment(BatchAugment.from_compose(A.Compose([A.Resize(32, 32), t])), oblong)).shape == (128, 3, 32, 32)  # the remedy


@pytest.mark.parametrize('t, message', [(A.Resize(8, 8, p=0.5), 'Resize: p is 0.5'), (A.RandomResizedCrop((8, 8), p=0.5), 'RandomResizedCrop: p is 0.5'),
                                        (A.Resize(8, 8, interpolation=cv2.INTER_AREA), 'interpolation is 3, but .* must be cv2.INTER_LINEAR'),
                                        (A.Rotate(crop_border=True), 'crop_border is True'), (A.ToGray(method='pca'), "method is 'pca'")])
def test_arguments_without_a_twin_are_refused(t, message):
    with pytest.raises(ValueError, match=message): BatchAugment.from_compose(A.Compose([t]))


# --- noise

def test_noise_is_added_as_albumentations_adds_it(imgs):
    for i, img in enumerate(imgs[::7]):
        noise = np.random.default_rng(i).normal(5, 60, img.shape).astype(np.float32)
        ref = A.GaussNoise(p=1).apply(img, noise_map=noise)
        assert (_added(torch.from_numpy(img.copy())[None], torch.from_numpy(noise)[None])[0].numpy() == ref).all()


@pytest.mark.parametrize('per_channel', [True, False])
def test_noise_is_distributed_as_albumentations(per_channel):
    t, grey = A.GaussNoise((0.05, 0.1), (-0.1, 0.1), per_channel=per_channel, p=1), np.full((16, 16, 3), 128, np.uint8)
    op, n = twin(t), 1500
    t.set_random_state(np.random.default_rng(0), random.Random(0))
    theirs = np.stack([t(image=grey)['image'] for _ in range(n)]).astype(float)
    par = op.draw(uniforms(item_keys(0, 0, range(n)), op.n), 16, 16)
    ours = op.apply(torch.from_numpy(grey).repeat(n, 1, 1, 1), **par).numpy().astype(float)
    for f in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)), lambda x: x[:, 3, 5, 1], lambda x: x[:, 3, 5, 1] - x[:, 3, 5, 2], lambda x: x[:, 3, 5, 0] - x[:, 4, 5, 0]):
        a, b = f(ours), f(theirs)
        assert (a == 0).all() == (b == 0).all() and ks_2samp(a, b).pvalue > 1e-4
    assert (ours[..., 0] == ours[..., 1]).all() != per_channel


def test_noise_depends_on_the_key_alone(photos):
    tfm, keys = BatchAugment.from_compose(A.Compose([A.GaussNoise(p=0.8), A.GaussianBlur(p=0.5), A.ColorJitter(p=0.5)])), item_keys(0, 0, range(128))
    whole, few = augment(tfm, photos, keys), augment(tfm, photos[[9, 4, 77]], keys[[9, 4, 77]])
    assert (whole[[9, 4, 77]] == few).all() and (augment(tfm, photos, item_keys(0, 1, range(128))) != whole).flatten(1).any(1).all()


# --- large images, one after the other

one_by_one_ops = [nm for nm in transforms if twin(make(nm)).one]


@pytest.mark.parametrize('name', one_by_one_ops)
def test_large_images_have_the_pixels_of_albumentations(name):
    t, rng = make(name), np.random.default_rng(0)
    pipe, op = A.Compose([t], seed=0, save_applied_params=True), twin(t)
    for _ in range(8):
        img = cv2.GaussianBlur(rng.integers(0, 256, (120, 120, 3), dtype=np.uint8), (5, 5), 0)
        ref = pipe(image=img)['image']
        par = as_drawn(pipe.transforms[0], pipe.transforms[0].params, img)
        mine = op.to_rows(torch.from_numpy(img.copy())[None], np.array([0]), **par)[0].numpy()
        most = 1 if isinstance(t, (A.RandomBrightnessContrast, A.Affine, A.Rotate)) else 0  # the matrix is rounded otherwise
        assert mine.shape == ref.shape and np.abs(mine.astype(int) - ref).max() <= most


@pytest.mark.parametrize('c', [1, 2, 3, 4])
@pytest.mark.parametrize('name', POLICIES)
def test_large_images_have_nearly_the_pixels_of_a_whole_batch(name, c):
    "With any number of channels that OpenCV takes"
    tfm, keys, rng = BatchAugment.from_compose(get_policy(name, 96, (0.5,)*c)), item_keys(0, 0, range(12)), np.random.default_rng(0)
    large = np.stack([cv2.GaussianBlur(rng.integers(0, 256, (96, 96, c), dtype=np.uint8), (5, 5), 0).reshape(96, 96, c) for _ in range(12)])
    def run(): return back(tfm(batch(large, keys), split_idx=0)).astype(int)
    assert 32**2 < LARGE <= 64**2
    mine = run()
    with mock.patch('s9_fastai.augment.batch_ops.LARGE', 10**9): apart = run()
    assert mine.shape == apart.shape and np.abs(mine - apart).max() <= 2 and (np.abs(mine - apart) > 0).mean() < 0.2
