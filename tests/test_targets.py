"Masks, points and boxes through AlbumentationsTransform in fastai's own blocks, against Albumentations called directly"
import random
import warnings
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.torch_core import TensorMultiCategory, set_seed
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage, PILMask, PointScaler, TensorBBox, TensorPoint
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, MaskBlock, PointBlock

from s9_fastai.augment.item import AlbumentationsTransform, KeyedRandom, SubpixelAffine
from s9_fastai.augment.keys import item_seed, under_key
from s9_fastai.augment.targets import with_params
import albumentations as A

vocab = ['cat', 'dog', 'owl']
n = 12


# --- a data set: images of different sizes, each with a mask, points, and labelled boxes

def size_of(i): return 40 + 3*(i % 4), 64 - 5*(i % 3)  # height, width


def image(i): return np.random.default_rng(i).integers(0, 256, (*size_of(i), 3), dtype=np.uint8)
def mask(i): return (image(i)[..., 0] // 64).astype(np.uint8)


def points(i):
    h, w = size_of(i)
    return [[0, 0], [w - 1, h - 1], [3 + i, 20], [w/2 + 0.25, h/3]]


def boxes(i):
    h, w = size_of(i)
    return [[0, 0, w, h], [3, 5, 13, 19 + i % 5], [w - 9, h - 12, w, h - 2], [w/2, h/2, w/2 + 8, h/2 + 6]][:1 + i % 4]


def labels(i): return [vocab[(i + k) % 3] for k in range(1 + i % 4)]


moves = {
    'flips': lambda: [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5), A.Transpose(p=0.5), A.RandomRotate90(p=0.5)],
    'affine': lambda: [SubpixelAffine(scale=(0.8, 1.2), rotate=(-30, 30), translate_percent=(-0.1, 0.1), p=0.8), A.RandomBrightnessContrast(p=0.5)],
    'mirrored borders': lambda: [A.ShiftScaleRotate(border_mode=cv2.BORDER_CONSTANT, p=0.9)],
    'crop': lambda: [A.RandomCrop(24, 32), A.HorizontalFlip(p=0.5)],
    'resized crop': lambda: [A.RandomResizedCrop((48, 40), p=1)],
    'pad and resize': lambda: [A.LongestMaxSize(56), A.PadIfNeeded(64, 64, border_mode=cv2.BORDER_CONSTANT), A.CoarseDropout((1, 3), (9, 20), (9, 20), p=0.7)],
    'safe crop': lambda: [A.BBoxSafeRandomCrop(p=1), A.Resize(32, 32)],
    'nested': lambda: [A.OneOf([A.Perspective(p=1), A.Sequential([A.Rotate(p=1), A.VerticalFlip(p=0.5)], p=1)], p=0.8), A.RandomScale(0.3, p=1)],
    'distortion': lambda: [A.ElasticTransform(alpha=20, keypoint_remapping_method='direct', p=0.7), A.GridDistortion(keypoint_remapping_method='direct', p=0.7), A.ToTensorV2()],
}


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return make()


def directly(make, i, key, params, **data):
    "Albumentations itself, with the generators that the transform gives item `i`"
    pipe, rng = quietly(lambda: A.Compose(make(), **params)), KeyedRandom()
    pipe.set_random_state(rng.np, rng.py)
    rng.rekey(key)
    return quietly(lambda: pipe(image=image(i), **data))


def pixels(y, x): return (np.asarray(y, np.float64).reshape(-1, 2) + 1)*np.array([x.shape[1], x.shape[0]])/2


def hwc(x): return x.permute(1, 2, 0).numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def item(i, *ys):
    x = PILImage.create(image(i))
    scale = PointScaler()
    return (x, *(scale((x, y))[1] if isinstance(y, TensorPoint) else y for y in ys))


def through(make, i, key, *ys, **params):
    tfm = quietly(lambda: AlbumentationsTransform(A.Compose(make(), **params), A.Compose(make(), **params)))
    return quietly(lambda: under_key(partial(tfm, split_idx=0), item(i, *ys), key))


own = dict(bbox_params=A.BboxParams('pascal_voc', clip=True, filter_invalid_bboxes=True, min_area=0.01, label_fields=['labels']),
           keypoint_params=A.KeypointParams('xy', remove_invisible=False))
strict = dict(bbox_params=A.BboxParams('pascal_voc', min_visibility=0.6, min_area=20, min_width=4, label_fields=['labels']))


@pytest.mark.parametrize('params', [own, strict], ids=['default', 'min_visibility'])
@pytest.mark.parametrize('move', moves)
def test_all_targets_of_an_item_are_moved_as_albumentations_moves_them(move, params):
    make, n_in, n_out = moves[move], 0, 0
    for i in range(n):
        key, names = item_seed(0, 3, i), TensorMultiCategory([vocab.index(o) for o in labels(i)])
        x, m, p, b, l = through(make, i, key, PILMask.create(mask(i)), TensorPoint.create(points(i)), TensorBBox.create(boxes(i)), names,
                                **({} if params is own else params))
        ref = directly(make, i, key, own | params, masks=[mask(i)], keypoints=np.array(points(i), np.float32),
                       bboxes=np.array(boxes(i), np.float32), labels=names.tolist())
        x, image_ = hwc(x), hwc(ref['image'])
        np.testing.assert_array_equal(x, image_)
        np.testing.assert_array_equal(np.asarray(m), ref['masks'][0])
        np.testing.assert_allclose(pixels(p, x), np.asarray(ref['keypoints'])[:, :2], atol=2e-3)
        np.testing.assert_allclose(pixels(b, x).reshape(-1, 4), ref['bboxes'], atol=2e-3)
        assert l.tolist() == list(ref['labels']) and (type(p), type(b), type(l)) == (TensorPoint, TensorBBox, TensorMultiCategory)
        assert p.img_size == b.img_size == x.shape[1::-1]
        n_in, n_out = n_in + len(names), n_out + len(l)
    assert 0 < n_out <= n_in
    if move == 'crop': assert n_out < n_in


# --- in fastai's blocks

kinds = {'mask': ((ImageBlock, MaskBlock(codes=['a', 'b', 'c', 'd'])), [mask]), 'points': ((ImageBlock, PointBlock), [points]),
         'boxes': ((ImageBlock, BBoxBlock, BBoxLblBlock(vocab)), [boxes, labels])}


def loaders(kind, train, valid=None, workers=0, before=(), seed=0, bs=4):
    set_seed(seed)
    blocks, get_y = kinds[kind]
    dblock = DataBlock(blocks, get_items=range, get_x=image, get_y=get_y, n_inp=1, splitter=IndexSplitter(range(4)),
                       item_tfms=[*before, AlbumentationsTransform(A.Compose(train), None if valid is None else A.Compose(valid))])
    return dblock.dataloaders(n, bs=bs, num_workers=workers, device='cpu')


def same(a, b): return len(a) == len(b) and all(x.shape == y.shape and (x == y).all() for c, d in zip(a, b) for x, y in zip(c, d))


@pytest.mark.parametrize('kind', kinds)
def test_in_a_datablock_with_any_number_of_workers(kind):
    train = [A.RandomCrop(24, 32), A.HorizontalFlip(p=0.5), A.Resize(36, 48)]
    valid = [A.Resize(36, 48)]
    dls = loaders(kind, train, valid)
    first, second = list(dls.train), list(dls.train)
    assert same(first, list(loaders(kind, train, valid, workers=2).train)) and not same(first, second)
    for x, *ys in first: assert x.shape == (4, 3, 36, 48) and all(len(y) == 4 for y in ys)
    plain = list(dls.valid)
    assert same(plain, list(dls.valid))
    for b, batch in enumerate(plain):
        for i, im in enumerate(batch[0]): np.testing.assert_array_equal((im*255).round().permute(1, 2, 0), A.Resize(36, 48)(image=image(4*b + i))['image'])


def expected(kind, make, i, key):
    "Image and targets of item `i` by Albumentations alone, the coordinates -1 to 1"
    data = dict(mask=dict(masks=[mask(i)]), points=dict(keypoints=np.float32(points(i))), boxes=dict(bboxes=np.float32(boxes(i)), labels=labels(i)))[kind]
    params = {k: v for k, v in own.items() if (k == 'bbox_params') == (kind == 'boxes')}
    out = directly(make, i, key, params, **data)
    sides = np.array(out['image'].shape[1::-1])
    if kind == 'mask': return out['image'], out['masks'][0]
    y = np.reshape(out['keypoints' if kind == 'points' else 'bboxes'], (-1, 2))*2/sides - 1
    return (out['image'], y) if kind == 'points' else (out['image'], y.reshape(-1, 4), [1 + vocab.index(o) for o in out['labels']])


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', kinds)
def test_a_datablock_gives_what_albumentations_gives_for_the_key_of_the_item(kind, workers):
    def make(): return [A.RandomCrop(24, 32), A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.5), A.Rotate(p=0.5), A.Resize(36, 48)]
    dl = loaders(kind, make(), [A.Resize(36, 48)], workers=workers).train
    for batch_no, (x, *ys) in enumerate(dl):
        for row, place in enumerate(dl.places(batch_no)):
            image_, y, *names = expected(kind, make, 4 + place, item_seed(dl.seed, dl.epoch, place))
            np.testing.assert_array_equal((x[row]*255).round().permute(1, 2, 0), image_)
            if kind != 'boxes': np.testing.assert_allclose(ys[0][row], y, atol=1e-4)
            else:
                np.testing.assert_allclose(ys[0][row][:len(y)], y, atol=1e-4)
                assert ys[1][row].tolist() == names[0] + [0]*(len(ys[1][row]) - len(names[0]))


@pytest.mark.parametrize('kind', ['points', 'boxes'])
def test_validation_without_a_pipeline_is_fastai_alone(kind):
    train, before = [A.HorizontalFlip(p=1)], [Resize((32, 40), 'squish')]
    (x, y, *_), = loaders(kind, train, before=before).valid
    for i in range(4):
        h, w = size_of(i)
        truth = np.reshape(points(i) if kind == 'points' else boxes(i), (-1, 2))*2/np.array([w, h]) - 1
        np.testing.assert_allclose(y[i].reshape(-1, 2)[:len(truth)], truth, atol=1e-5)


@pytest.mark.parametrize('method', ['squish', 'crop', 'pad'])
@pytest.mark.parametrize('kind', ['points', 'boxes'])
def test_a_resize_before_it_changes_the_size_that_coordinates_belong_to(kind, method):
    before = [Resize((32, 40), method)]
    flipped, = loaders(kind, [A.VerticalFlip(p=1), A.Transpose(p=1)], before=before, bs=8).train
    plain, = loaders(kind, [A.NoOp()], before=before, bs=8).train
    np.testing.assert_array_equal(flipped[0], plain[0].flip(2).transpose(2, 3))
    y, z = (np.asarray(o[1]).reshape(8, -1, 2) for o in (plain, flipped))
    if kind == 'points': np.testing.assert_allclose(z, (y*[1, -1] - [0, 2/32])[..., ::-1], atol=1e-4)  # by pixels: h - 1 - y
    else: assert_boxes(y, z)


def assert_boxes(y, z):
    "Boxes `z` are the boxes `y`, turned upside down and transposed; what is padded with zeros stays so"
    y, z = y.reshape(8, -1, 4), z.reshape(8, -1, 4)
    turned = np.stack([-y[..., 3], y[..., 0], -y[..., 1], y[..., 2]], -1)
    np.testing.assert_allclose(z, turned, atol=1e-4)


def test_boxes_that_leave_go_with_their_labels_and_the_batch_is_padded():
    n_boxes = []
    for seed in range(3):
        for _, b, l in loaders('boxes', [A.RandomCrop(16, 16)], [A.CenterCrop(16, 16)], seed=seed).train:
            assert b.shape[:2] == l.shape and l.dtype == torch.int64
            areas = (b[..., 2] - b[..., 0])*(b[..., 3] - b[..., 1])
            assert ((areas > 0) == (l > 0)).all() and b.abs().max() <= 1
            n_boxes += (l > 0).sum(1).tolist()
    assert min(n_boxes) >= 1 and sum(n_boxes) < 3*sum(1 + i % 4 for i in range(4, n))


def test_a_batch_without_any_box():
    dls = loaders('boxes', [A.Crop(20, 0, 22, 4)], [A.Crop(20, 0, 22, 4)])
    kinds_, = {tuple(b.shape[1:]) for _, b, _ in dls.train}
    assert kinds_ == (1, 4)  # the box of the whole image
    small = AlbumentationsTransform(A.Compose([A.Crop(20, 0, 22, 4)], bbox_params=A.BboxParams('pascal_voc', min_visibility=0.5)))
    _, b, l = small(item(3, TensorBBox.create(boxes(3)), TensorMultiCategory([1, 2, 3, 1])), split_idx=0)
    assert b.shape == (0, 4) and l.shape == (0,) and type(b) is TensorBBox and type(l) is TensorMultiCategory


# --- what does not go

def test_points_or_boxes_in_pixels_are_refused():
    tfm, x = AlbumentationsTransform(A.Compose([A.HorizontalFlip(p=1)])), PILImage.create(image(0))
    for y in (TensorPoint.create(points(0)), TensorBBox.create(boxes(0))):
        with pytest.raises(ValueError, match='has no img_size, so no PointScaler made its coordinates -1 to 1: use PointBlock'): tfm((x, y), split_idx=0)
        assert type(tfm(PointScaler()((x, y)), split_idx=0)[1]) is type(y)


@pytest.mark.parametrize('kind, pixels_moved', [('points', 'TensorPoint'), ('boxes', 'TensorBBox')])
def test_a_transform_that_cannot_move_them_is_refused_at_setup(kind, pixels_moved):
    class Mirror(A.DualTransform):
        _targets = A.HorizontalFlip._targets
        def apply(self, img, **params): return img[:, ::-1]
        def apply_to_mask(self, mask, **params): return mask[:, ::-1]

    with pytest.raises(TypeError, match=f'Mirror would move the image, but not its {pixels_moved}: take Mirror out'):
        loaders(kind, [A.HorizontalFlip(), Mirror(p=0.01)], before=[Resize(32)])
    loaders(kind, [A.HorizontalFlip()], before=[Resize(32)])  # the remedy
    loaders('mask', [A.HorizontalFlip(), Mirror(p=0.01)], before=[Resize(32)])


def test_a_distortion_that_loses_points_is_refused_at_setup():
    with pytest.raises(ValueError, match="ElasticTransform: keypoint_remapping_method is 'mask', which loses points"): loaders('points', [A.ElasticTransform(p=0.01)])
    loaders('points', [A.ElasticTransform(keypoint_remapping_method='direct', p=0.01)])  # the remedy
    loaders('boxes', [A.ElasticTransform(p=0.01)])


@pytest.mark.parametrize('params, message, remedied', [
    (dict(bbox_params=A.BboxParams('coco')), r"bbox_params has format='coco', .*: give A.BboxParams\('pascal_voc'\)", dict(bbox_params=A.BboxParams('pascal_voc'))),
    (dict(keypoint_params=A.KeypointParams('xy')), r"has remove_invisible=True, .*: give A.KeypointParams\('xy', remove_invisible=False\)", own),
    (dict(keypoint_params=A.KeypointParams('xya', remove_invisible=False)), "has format='xya'", own),
    (dict(additional_targets=dict(other='image')), 'Compose has additional_targets, .*: leave that out', {})])
def test_parameters_that_do_not_fit_are_refused_at_construction(params, message, remedied):
    for make in (lambda p: AlbumentationsTransform(A.Compose([A.HorizontalFlip()], **p)), lambda p: AlbumentationsTransform(A.Compose([]), A.Compose([A.HorizontalFlip()], **p))):
        with pytest.raises(ValueError, match=message): make(params)
        make(remedied)


def test_parameters_of_an_inner_composition_have_no_effect():
    with pytest.raises(ValueError, match='an inner Compose has bbox_params, which has no effect there: give it to the outermost'):
        AlbumentationsTransform(A.OneOf([A.Compose([A.HorizontalFlip()], bbox_params=A.BboxParams('pascal_voc'))]))
    AlbumentationsTransform(A.Compose([A.OneOf([A.HorizontalFlip()])], bbox_params=A.BboxParams('pascal_voc')))


def test_images_without_targets_get_the_same_draws_as_before():
    "A pipeline with parameters, and one for items with points, draw what the plain one draws"
    x = image(0)
    for move in ('flips', 'affine', 'resized crop'):
        for i in range(5):
            key = item_seed(1, 0, i)
            plain = directly(moves[move], 0, key, {})['image']
            for params in ({}, strict): np.testing.assert_array_equal(hwc(through(moves[move], 0, key, **params)[0]), plain)
    assert with_params(A.Compose(moves['crop'](), p=0.3)).p == 0.3 and x.shape == (40, 64, 3)


def test_labels_by_number_reach_a_dropout_that_asks_for_them():
    "`ConstrainedCoarseDropout` cuts holes into boxes of a class, by its number"
    drop = AlbumentationsTransform(A.Compose([A.ConstrainedCoarseDropout(num_holes_range=(1, 1), hole_height_range=(0.5, 0.5), hole_width_range=(0.5, 0.5), bbox_labels=[2], p=1)]))
    x = PILImage.create(np.full((40, 64, 3), 255, np.uint8))
    bs = PointScaler()((x, TensorBBox.create([[0, 0, 20, 20], [40, 20, 60, 40]])))[1]
    random.seed(0)
    out = np.asarray(drop((x, bs, TensorMultiCategory([1, 2])), split_idx=0)[0])
    assert (out[:20, :20] == 255).all() and (out[20:, 40:60] == 0).any()
