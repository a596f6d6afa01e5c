"""The augmentation against albumentations 1.3's own formulas and over many draws, and its manners in any fastai DataBlock"""
import copy
import hashlib
import os
import pickle
import subprocess
import sys
import warnings

import cv2
import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.torch_core import TensorCategory, TensorImage, TensorMask, TensorMultiCategory, set_seed
from fastai.vision.core import LabeledBBox, PILImage, PILImageBW, PILMask, TensorBBox, TensorPoint
from fastai.vision.data import ImageBlock
from fastcore.basics import fastuple
from fastcore.foundation import L
from PIL import Image
from processes import python

from s9_fastai.augment.item import AlbumentationsTransform, KeyedRandom, SubpixelAffine
from s9_fastai.augment.policies import POLICIES, get_policy, reference_policy
from s9_fastai.cifar.facts import MEAN, SIZE
from s9_fastai.augment.keys import item_key, item_seed
from s9_fastai.augment.pipelines import check_pipeline, moving
import albumentations as A

n_draws = 8000
noise = A.Compose([A.PixelDropout(dropout_prob=0.5, p=1)])  # 64 random bits in an image of 8x8: two equal ones mean one draw


def draw(tfm, img, idx, epoch=0):
    "The training pipeline's image for one key"
    token = item_key.set(item_seed(0, epoch, idx))
    try: return np.asarray(tfm(img, split_idx=0))
    finally: item_key.reset(token)


def drawn(tfm, img, idx):
    "As `draw`, with the numbers that each transform drew; None for one that did not take part"
    return draw(tfm, img, idx), [t.params or None for t in tfm.train]


@pytest.fixture(scope='module')
def img(): return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def grey_draws():
    "Many draws of the reference policy on an image of one grey"
    tfm, grey = AlbumentationsTransform(reference_policy(32)), np.full((32, 32, 3), 200, np.uint8)
    return [drawn(tfm, grey, i) for i in range(n_draws)]


def looks_uniform(xs, lo, hi):
    "Kolmogorov-Smirnov: the largest gap to the uniform distribution is one that chance exceeds once in 30,000 times"
    xs = (np.sort(xs) - lo)/(hi - lo)
    steps = np.arange(len(xs) + 1)/len(xs)
    gap = max((steps[1:] - xs).max(), (xs - steps[:-1]).max())
    return xs[0] >= 0 and xs[-1] <= 1 and gap < 2.35/len(xs)**0.5


# --- the meaning of albumentations 1.3

def shift_13(matrix):
    "The shift in pixels that is left of an affine `matrix` once its turn and scale about the middle are taken off"
    mid = np.array([15.5, 15.5])
    return matrix[:2, 2] + matrix[:2, :2] @ mid - mid


def affine_13(img, par):
    "1.3: cv2's matrix about the middle, then the shift, then one warp with mirrored borders"
    m = cv2.getRotationMatrix2D((15.5, 15.5), par['rotate'], par['scale']['x'])
    m[:, 2] += shift_13(par['matrix'])
    return cv2.warpAffine(img, m, (32, 32), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def dropout_13(img, par):
    img = img.copy()
    for x1, y1, x2, y2 in par['holes']: img[y1:y2, x1:x2] = (0.4914, 0.4822, 0.4465)
    return img


def brightness_13(img, par):
    lut = np.arange(256).astype('float32')*np.float32(par['alpha']) + np.float32(par['beta'])
    return cv2.LUT(img, np.clip(lut, 0, 255).astype('uint8'))


def test_the_policy_is_the_pipeline_of_albumentations_1_3(img):
    tfm, seen = AlbumentationsTransform(reference_policy(32)), set()
    for i in range(300):
        out, (affine, flip, hole, light, _) = drawn(tfm, img, i)
        ref = img
        if affine is not None: ref = affine_13(ref, affine)
        if flip is not None: ref = ref[:, ::-1].copy()
        if hole is not None: ref = dropout_13(ref, hole)
        if light is not None: ref = brightness_13(ref, light)
        np.testing.assert_array_equal(out, ref)
        seen.add(tuple(o is not None for o in (affine, flip, hole, light)))
    assert len(seen) == 16  # every combination was compared


def test_the_originals_fill_is_black_on_bytes():
    assert (dropout_13(np.full((32, 32, 3), 200, np.uint8), {'holes': [(0, 0, 32, 32)]}) == 0).all()


def test_fractions(grey_draws):
    took = np.array([[o is not None for o in pars] for _, pars in grey_draws])
    for rate, p in zip(took.mean(0), (0.3, 0.5, 0.5, 0.2, 1.)):
        assert abs(rate - p) <= 4*(p*(1 - p)/n_draws)**0.5, (rate, p)
    corr = np.corrcoef(took[:, :4].T) - np.eye(4)
    assert abs(corr).max() < 4/n_draws**0.5  # no transform's turn depends on another's


def test_affine_distribution(grey_draws):
    pars = [o[0] for _, o in grey_draws if o[0] is not None]
    assert all(o['scale']['x'] == o['scale']['y'] for o in pars)  # one scale for both axes
    shifts = np.array([shift_13(o['matrix']) for o in pars])
    assert looks_uniform([o['scale']['x'] for o in pars], 0.8, 1.2)
    assert looks_uniform([o['rotate'] for o in pars], -15, 15)
    for xs in shifts.T: assert looks_uniform(xs, -2, 2)
    assert (abs(shifts - shifts.round()) > 1e-3).mean() > 0.99  # fractions of a pixel
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 4/len(pars)**0.5  # each axis has its own


def test_brightness_distribution(grey_draws):
    pars = [o[3] for _, o in grey_draws if o[3] is not None]
    assert looks_uniform([o['alpha'] for o in pars], 0.8, 1.2)
    assert looks_uniform([o['beta']/255 for o in pars], -0.2, 0.2)


def test_whole_holes_everywhere_and_mirrored_borders(grey_draws):
    counts = np.zeros((17, 17), int)
    for out, (_, _, hole, light, _) in grey_draws:
        rest = np.median(out)  # the hole is a quarter of the image
        inside = (out != rest).any(-1)
        if hole is None: assert not inside.any()  # also after a shift or a turn: a black border would show on the grey
        else:
            ys, xs = np.nonzero(inside)
            y, x = ys.min(), xs.min()
            assert inside[y:y+16, x:x+16].all() and inside.sum() == 256
            assert light is not None or (out[inside] == 0).all()
            counts[y, x] += 1
    expected = counts.sum()/17**2
    chi2 = ((counts - expected)**2/expected).sum()
    assert abs(chi2 - 288) < 5*(2*288)**0.5 and counts.min() > 0  # 288 degrees of freedom


def test_mean_colour_fill():
    tfm, white = AlbumentationsTransform(get_policy('reference_mean', SIZE, MEAN)), np.full((32, 32, 3), 255, np.uint8)
    holes = [out for out, p in (drawn(tfm, white, i) for i in range(100)) if p[2] is not None and p[3] is None]
    assert len(holes) > 20
    for out in holes: assert np.unique(out.reshape(-1, 3), axis=0).tolist() == [[125, 123, 114], [255, 255, 255]]


def test_larger_images_are_cropped_in_the_middle():
    big = np.zeros((40, 48, 3), np.uint8)
    big[4:36, 8:40] = 255
    tfm = AlbumentationsTransform(reference_policy(32), valid=A.Compose([]))  # on purpose: validation images stay large
    plain = [out for out, p in (drawn(tfm, big, i) for i in range(60)) if p[0] is p[2] is p[3] is None]
    assert plain and all((o == 255).all() and o.shape == (32, 32, 3) for o in plain)


# --- what is refused

def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return make()


@pytest.mark.parametrize('make, name', [
    (lambda: A.Compose([A.CoarseDropout(max_holes=1, max_height=16, max_width=16, p=0.5)]), 'max_holes, max_height, max_width'),
    (lambda: A.Compose([A.HorizontalFlip(always_apply=True)]), 'always_apply'),
    (lambda: A.Compose([SubpixelAffine(shift_limit=0.1)]), 'shift_limit'),
    (lambda: A.Compose([A.OneOf([A.Sequential([A.HorizontalFlip(pp=1)])])]), 'pp'),
    (lambda: A.Compose([A.SomeOf([A.HorizontalFlip(), A.VerticalFlip(pp=1)], n=1)]), 'pp'),
    (lambda: A.Compose([A.SelectiveChannelTransform([A.RandomGamma(gamma=1)])]), 'gamma')])
@pytest.mark.parametrize('place', ['train', 'valid'])
def test_an_unknown_argument_is_an_error(make, name, place):
    pipe = quietly(make)
    with pytest.raises(ValueError, match=f'has no argument {name}: its arguments are '):
        AlbumentationsTransform(**{'train': A.Compose([]), place: pipe})


@pytest.mark.parametrize('bad', [A.HorizontalFlip(), [A.HorizontalFlip()], lambda image: image, None])
def test_only_compositions(bad):
    with pytest.raises(TypeError, match='a pipeline must be an A.Compose'): check_pipeline(bad)


@pytest.mark.parametrize('x', [
    [1, 2], {'a': 1}, None, 'x.png', 3, torch.zeros(3, 32, 32), TensorImage(torch.zeros(3, 32, 32)), np.zeros((32, 32, 3)),
    np.zeros((32, 32, 3), np.uint16), np.zeros((2, 32, 32, 3), np.uint8), Image.new('RGB', (32, 32)),
    PILImage(Image.new('RGBA', (32, 32))), PILImage(Image.new('P', (32, 32)))], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize('as_item', [False, True])
def test_items_it_cannot_transform_are_refused(x, as_item):
    with pytest.raises((TypeError, ValueError), match='AlbumentationsTransform takes|mode is'):
        AlbumentationsTransform(noise)((x, 'cat') if as_item else x, split_idx=0)


def pil(): return PILImage.create(np.full((32, 32, 3), 90, np.uint8))


in_places = {
    'labelled boxes': LabeledBBox(TensorBBox(torch.zeros(1, 4)), L('a')),
    'image': pil(), 'image of PIL': Image.new('RGB', (32, 32)), 'array': np.zeros((32, 32), np.uint8), 'TensorImage': TensorImage(torch.zeros(3, 32, 32)),
    'TensorMask': TensorMask(torch.zeros(32, 32)), 'points as an array': np.zeros((5, 2)), 'points as a tensor': torch.zeros(5, 2)}
not_in_places = {
    'text': 'cat', 'number': 3, 'float': 0.5, 'category': TensorCategory(3), 'regression': torch.tensor([0.5, 2.]), 'list': ['cat', 'dog'], 'None': None,
    'soft label': np.array([0.2, 0.8]), 'multi-label': TensorMultiCategory(torch.zeros(5)), 'several labels': TensorCategory(torch.zeros(4, 10)),
    'array of names': np.array(['cat', 'dog']), 'scalar': np.float32(3)}
colours = {  # pixels change in their places
    'colours': lambda: [A.ColorJitter(p=1), A.RandomGamma(p=1), A.Normalize()], 'nested': lambda: [A.OneOf([A.Blur(p=1), A.Sequential([A.CLAHE(p=1)], p=1)], p=1)],
    'dropouts': lambda: [A.CoarseDropout(p=1), A.GridDropout(p=1), A.XYMasking((1, 2), (1, 2), 4, 4, p=1), A.Erasing(p=1), A.PixelDropout(p=1)],
    'noise': lambda: [A.GaussNoise(p=1), A.SomeOf([A.ISONoise(p=1), A.NoOp()], n=1), A.ToTensorV2()], 'p=0': lambda: [A.HorizontalFlip(p=0), A.OneOf([A.Rotate()], p=0)],
    'a dilation': lambda: [A.Morphological(p=1)], 'my own': lambda: [Darker(p=1)]}
moves = {  # names of what moves pixels
    'HorizontalFlip': lambda: [A.Blur(), A.HorizontalFlip(p=1)], 'Rotate': lambda: [A.OneOf([A.Blur(p=1), A.Rotate(p=1)], p=1)],
    'RandomCrop': lambda: [A.RandomCrop(8, 8)], 'Resize': lambda: [A.Sequential([A.SomeOf([A.Resize(8, 8)], n=1)])], 'ElasticTransform': lambda: [A.ElasticTransform(p=0.01)],
    'Transpose': lambda: [A.OneOrOther(A.Blur(p=1), A.Transpose(p=0), p=1)], 'Lambda': lambda: [Unknown(p=1)], 'SubpixelAffine': lambda: [SubpixelAffine(rotate=3)],
    'GridDistortion, Perspective': lambda: [A.RandomOrder([A.GridDistortion(), A.Perspective(), A.Perspective()], n=2)]}


class Darker(A.ImageOnlyTransform):
    def apply(self, img, **params): return img//2


class Unknown(A.Lambda): pass


Unknown.__name__ = 'Lambda'


def both(make):
    pipe = quietly(lambda: A.Compose(make()))
    return AlbumentationsTransform(pipe, pipe)


@pytest.mark.parametrize('move', moves)
@pytest.mark.parametrize('y', in_places)
def test_targets_in_places_are_refused_by_the_name_of_what_moves_the_image(y, move):
    tfm, y = both(moves[move]), in_places[y]
    for split_idx in (0, 1):
        for item in ((pil(), y), (pil(), 'cat', y), ((pil(), pil()), 'same')):
            with pytest.raises(TypeError, match=f'{move} would move the image, but not its .*: take {move} out, or '): tfm(item, split_idx=split_idx)


@pytest.mark.parametrize('colour', colours)
@pytest.mark.parametrize('y', in_places)
def test_targets_in_places_pass_where_colours_change(y, colour):
    tfm, y, x = both(colours[colour]), in_places[y], pil()
    for split_idx in (0, 1):
        out = tfm((x, 'cat', y), split_idx=split_idx)
        assert type(out) is tuple and len(out) == 3 and out[1] == 'cat' and out[2] is y
    assert np.asarray(x).tolist() == np.asarray(pil()).tolist()


@pytest.mark.parametrize('move', ['HorizontalFlip', 'Rotate'])
@pytest.mark.parametrize('y', not_in_places)
def test_other_targets_pass_everywhere(y, move):
    y = not_in_places[y]
    assert both(moves[move])((pil(), y), split_idx=0)[1] is y


def test_every_transform_of_albumentations_is_one_of_the_two():
    "By what it does to a key point: a transform that can move one is in `moving`, one that cannot is not"
    still = {'Blur', 'ColorJitter', 'CoarseDropout', 'GridDropout', 'PixelDropout', 'Morphological', 'Erasing', 'XYMasking', 'RandomGamma', 'MotionBlur', 'NoOp'}
    moved = {'HorizontalFlip', 'VerticalFlip', 'Transpose', 'Rotate', 'Affine', 'D4', 'ElasticTransform', 'GridDistortion', 'OpticalDistortion', 'Perspective',
             'RandomGridShuffle', 'RandomScale', 'RandomRotate90', 'SafeRotate', 'ThinPlateSpline'}
    point = np.array([[7., 21.]], np.float32)
    for name in still | moved:
        kwargs = {'XYMasking': dict(num_masks_x=1, num_masks_y=1, mask_x_length=2, mask_y_length=2), 'Affine': dict(rotate=(5, 9))}.get(name, {})
        pipe = A.Compose([getattr(A, name)(p=1, **kwargs)], keypoint_params=A.KeypointParams('xy', remove_invisible=False), seed=1)
        outs = [quietly(lambda: pipe(image=np.asarray(pil()), keypoints=point))['keypoints'] for _ in range(8)]
        assert any(len(o) and abs(o - point).max() > 1e-3 for o in outs) == bool(moving(pipe)) == (name in moved), name


# --- tuples of images

class Pair(fastuple): pass


def pair_of(tfm, x, y): return tfm((Pair(x, y), 'same'), split_idx=0)


def test_each_image_of_a_tuple_is_augmented():
    tfm = AlbumentationsTransform(A.Compose([A.PixelDropout(dropout_prob=0.5, p=1)]))
    pair, label = pair_of(tfm, pil(), pil())
    assert type(pair) is Pair and [type(o) for o in pair] == [PILImage]*2 and label == 'same'
    dropped = [(np.asarray(o) == 0).mean() for o in pair]
    assert all(0.4 < o < 0.6 for o in dropped) and (np.asarray(pair[0]) != np.asarray(pair[1])).any()  # each has draws of its own
    (x, other), _ = tfm(((pil(), torch.ones(3, 3)), 'cat'), split_idx=0)  # an image with numbers beside it
    assert (np.asarray(x) == 0).any() and (other == 1).all()


def test_an_image_with_numbers_beside_it_may_move(img):
    (x, other), _ = AlbumentationsTransform(A.Compose([A.HorizontalFlip(p=1)]))(((img, 'text'), 'cat'), split_idx=0)
    np.testing.assert_array_equal(x, img[:, ::-1])


def test_a_second_image_in_the_item_keeps_its_pixels(img):
    second = PILImage.create(img)
    x, y, _ = AlbumentationsTransform(A.Compose([Darker(p=1)]))(fastuple(PILImage.create(img), second, 'same'), split_idx=0)
    np.testing.assert_array_equal(np.asarray(x), img//2)
    assert y is second


@pytest.mark.parametrize('y', [TensorPoint(torch.zeros(1, 2)), TensorBBox(torch.zeros(1, 4))], ids=['points', 'boxes'])
def test_points_and_boxes_without_a_transform_that_moves_them(img, y):
    item = (PILImage.create(img), PILMask.create(img[..., 0]), y)
    still = AlbumentationsTransform(quietly(lambda: A.Compose([A.HorizontalFlip(), Unknown(image=lambda x, **_: x[::-1], p=1)])))
    with pytest.raises(TypeError, match=f'Lambda would move the image, but not its {type(y).__name__}: take Lambda out, or '): still(item, split_idx=0)
    pair = (item[0], item[0]), 'same', y  # the images of a pair have draws of their own
    with pytest.raises(TypeError, match='Flip would move the image, but not its'): AlbumentationsTransform(A.Compose([A.HorizontalFlip()]))(pair, split_idx=0)
    out = AlbumentationsTransform(A.Compose([Darker(p=1)]))(item, split_idx=0)
    np.testing.assert_array_equal(np.asarray(out[1]), img[..., 0])
    assert out[2] is y


def test_a_mask_moves_with_its_image(img):
    tfm = AlbumentationsTransform(A.Compose([A.HorizontalFlip(p=0.5), A.Transpose(p=0.5)]))
    seen = set()
    set_seed(0)
    for i in range(40):
        x, m = tfm((PILImage.create(img), PILMask.create(img[..., 0])), split_idx=0)
        np.testing.assert_array_equal(np.asarray(x)[..., 0], np.asarray(m))
        seen.add(np.asarray(m).tobytes())
    assert len(seen) == 4


# --- types

def test_it_never_touches_items_outside_training(img):
    tfm, pil = AlbumentationsTransform(noise), PILImage.create(img)
    for split_idx in (None, 1):
        for x in (pil, img, (pil, 'cat')): assert tfm(x, split_idx=split_idx) is x


def test_items_outside_training_get_valid(img):
    tfm = AlbumentationsTransform(noise, A.Compose([A.HorizontalFlip(p=1)]))
    for split_idx in (None, 1): np.testing.assert_array_equal(tfm(img, split_idx=split_idx), img[:, ::-1])


def test_type_and_input_are_kept(img):
    class Mine(np.ndarray): pass
    tfm = AlbumentationsTransform(A.Compose([A.HorizontalFlip(p=1), A.RandomBrightnessContrast(p=1)]))
    fixed = img.copy()
    fixed.flags.writeable = False  # the data are read-only
    for x in (PILImage.create(img), PILImageBW.create(img[..., 0]), fixed, fixed.view(Mine), fixed[..., 0]):
        before = np.asarray(x).copy()
        res = tfm(x, split_idx=0)
        assert type(res) is type(x) and np.asarray(res).dtype == np.uint8 and np.asarray(res).shape == before.shape
        np.testing.assert_array_equal(np.asarray(x), before)


# --- randomness

def blank(i): return np.full((8, 8, 3), 128, np.uint8)
def label(i): return 'blank'

def batches(num_workers, seed, n_epochs=3):
    "Every image of `n_epochs` as bytes, in a DataBlock that knows nothing of this package but its transform"
    set_seed(seed)
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=range, get_x=blank, get_y=label,
                      splitter=IndexSplitter([0]), item_tfms=AlbumentationsTransform(noise))
    dls = block.dataloaders(65, bs=8, num_workers=num_workers, drop_last=False, device='cpu')
    return [[x.numpy().tobytes() for xb, _ in dls.train for x in xb] for _ in range(n_epochs)]


@pytest.mark.parametrize('num_workers', [0, 1, 2])
def test_any_datablock_repeats_no_draw_and_follows_set_seed(num_workers):
    first, other = batches(num_workers, 42), batches(num_workers, 43, 1)
    assert len(set(sum(first, []))) == 3*64
    assert batches(num_workers, 42) == first
    assert not set(other[0]) & set(sum(first, []))


def test_a_key_decides_alone(img):
    tfm, twin = (AlbumentationsTransform(reference_policy(32)) for _ in range(2))
    outs = [draw(tfm, img, i, e).tobytes() for e in range(2) for i in range(50)]
    set_seed(5), np.random.seed(1)
    assert [draw(twin, img, i, e).tobytes() for e in reversed(range(2)) for i in reversed(range(50))] == outs[::-1]
    assert len(set(outs)) > 60  # 28% are untouched or only flipped


@pytest.mark.parametrize('pipe', [
    A.Compose([A.OneOf([A.PixelDropout(p=1), A.ShotNoise(p=1)], p=1)]),
    A.Compose([A.SomeOf([A.PixelDropout(p=1), A.RandomGamma(p=1)], n=2)]),
    A.Sequential([A.PixelDropout(p=1)], p=1), A.ReplayCompose([A.PixelDropout(p=1)]),
    A.OneOrOther(A.PixelDropout(p=1), A.ShotNoise(p=1)),
    A.Compose([A.SelectiveChannelTransform([A.PixelDropout(p=1)], channels=[0, 1], p=1)])
], ids=['OneOf', 'SomeOf', 'Sequential', 'ReplayCompose', 'OneOrOther', 'SelectiveChannelTransform'])
def test_nested_compositions_draw_by_key_too(img, pipe):
    tfm = AlbumentationsTransform(pipe)
    outs = [draw(tfm, img, i).tobytes() for i in range(10)]
    assert len(set(outs)) == 10 and [draw(tfm, img, i).tobytes() for i in range(10)] == outs


def test_the_users_pipeline_is_left_alone(img):
    pipe = A.Compose([A.GaussNoise(p=1)], seed=3)
    ref = [A.Compose([A.GaussNoise(p=1)], seed=3)(image=img)['image']]
    draw(AlbumentationsTransform(pipe), img, 0)
    np.testing.assert_array_equal(pipe(image=img)['image'], ref[0])


@pytest.mark.parametrize('copied', [
    copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), lambda o: pickle.loads(pickle.dumps(o, 2))], ids=['deepcopy', 'pickle', 'pickle 2'])
def test_a_copy_draws_the_same_and_still_by_key(img, copied):
    tfm = AlbumentationsTransform(reference_policy(32))
    twin = copied(tfm)
    outs = [draw(tfm, img, i).tobytes() for i in range(30)]
    assert [draw(twin, img, i).tobytes() for i in range(30)] == outs and len(set(outs)) > 15
    assert [draw(tfm, img, i).tobytes() for i in range(30)] == outs  # the twin has generators of its own


def test_rekey_is_a_new_generator():
    rng = KeyedRandom()
    for key in (0, 1, 2**64, 2**128 - 1, item_seed(1, 2, 3)):
        rng.np.integers(0, 9, 5), rng.np.random(dtype='float32')  # leaves half a word in the buffer
        rng.rekey(key)
        plain = np.random.Generator(np.random.Philox(key=key))
        np.testing.assert_array_equal(rng.np.integers(0, 2**31, 9, dtype='int32'), plain.integers(0, 2**31, 9, dtype='int32'))
        np.testing.assert_array_equal(rng.np.normal(size=3), plain.normal(size=3))


# --- a process of its own

def run(code, **env):
    "What a new Python prints"
    env = {**{k: v for k, v in os.environ.items() if k != 'NO_ALBUMENTATIONS_UPDATE'}, **env}
    cmd = [sys.executable, '-W', 'ignore', '-c', code]
    return subprocess.run(cmd, env=env, check=True, capture_output=True, text=True).stdout.strip()


def test_import_is_quiet_on_the_network():
    code = '''import os, socket, urllib.request
calls = []
def spy(*args, **kwargs):
    calls.append(args)
    raise OSError('no network')
socket.socket.connect = socket.getaddrinfo = urllib.request.urlopen = spy
import s9_fastai.augment.item
print(len(calls), os.environ['NO_ALBUMENTATIONS_UPDATE'])'''
    assert run(code) == '0 1'
    assert run(code.replace('s9_fastai.augment.item', 'albumentations').replace("environ['NO_ALBUMENTATIONS_UPDATE']", 'name'))[0] != '0'


def test_opencv_threads_are_off(tmp_path):
    "Where it is made, and where a pickle of it is read: in a worker that is not forked, or after `load_learner`"
    code = f'''import cv2, pickle
from s9_fastai.augment.item import AlbumentationsTransform
from s9_fastai.augment.policies import reference_policy
for make in (lambda: AlbumentationsTransform(reference_policy(32)), lambda: pickle.load(open({str(tmp_path/'tfm.pkl')!r}, 'rb'))):
    cv2.setNumThreads(2)
    make()
    print(cv2.getNumThreads())'''
    (tmp_path/'tfm.pkl').write_bytes(pickle.dumps(AlbumentationsTransform(reference_policy(32))))
    assert python(code).split() == ['1', '1']


def test_a_second_process_draws_the_same(img):
    code = '''import hashlib, numpy as np
from s9_fastai.augment.item import AlbumentationsTransform
from s9_fastai.augment.policies import reference_policy
from s9_fastai.augment.keys import item_key, item_seed
tfm, img = AlbumentationsTransform(reference_policy(32)), np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
h = hashlib.sha256()
for i in range(50):
    item_key.set(item_seed(0, 0, i))
    h.update(tfm(img, split_idx=0).tobytes())
print(h.hexdigest())'''
    tfm = AlbumentationsTransform(reference_policy(32))
    assert run(code, PYTHONHASHSEED='7') == hashlib.sha256(b''.join(draw(tfm, img, i).tobytes() for i in range(50))).hexdigest()


@pytest.mark.parametrize('size', [8, 32, 64, 225])
@pytest.mark.parametrize('name', POLICIES)
def test_a_policy_keeps_its_proportions_at_any_size(name, size):
    "Images come out in their size; the lengths are these parts of the side: hole of the experiment, cutout, shift"
    policy = get_policy(name, size, MEAN)
    if name == 'none': return
    x = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    assert {policy(image=x)['image'].shape for _ in range(20)} == {(size, size, 3)}
    of = {type(t).__name__: t for t in policy.transforms}
    if hole := of.get('CoarseDropout'):
        side = size//2 if name.startswith('reference') else size//4
        assert hole.hole_height_range == hole.hole_width_range == (side, side)
        assert hole.fill == ((0, 0, 0) if name == 'reference' else (125, 123, 114))
    if pad := of.get('PadIfNeeded'): assert pad.min_height == pad.min_width == size + 2*(size//8)


@pytest.mark.parametrize('name', ['reference_mean', 'flip_crop_cutout'])
def test_a_mean_of_bytes_is_refused(name):
    "Clipped to white holes it would go unnoticed"
    with pytest.raises(ValueError, match=r'mean is \(125, 123, 114\), but must be from 0 to 1.*: divide it by 255'): get_policy(name, SIZE, (125, 123, 114))


def test_policies():
    assert set(POLICIES) == {'reference', 'reference_mean', 'flip_crop', 'flip_crop_cutout', 'alt_flip_crop', 'resized_crop', 'none'} and not get_policy('none', SIZE, MEAN).transforms
    assert get_policy('reference', SIZE, MEAN) is not get_policy('reference', SIZE, MEAN)
    with pytest.raises(ValueError, match="policy is 'refrence', but must be 'reference', 'reference_mean', 'flip_crop'"): get_policy('refrence', SIZE, MEAN)
