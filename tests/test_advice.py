"""The remedy in each message of augmentation, batch augmentation and readers, carried out: the expression that the message
contains is evaluated, and what it gives is accepted and right"""
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorCategory, TensorImage, TensorImageBase, TensorMask
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import PILImage, PILImageBW, PILMask, TensorBBox, TensorPoint
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, MaskBlock, PointBlock
from PIL import Image, ImageCms

from s9_fastai.augment.item import AlbumentationsTransform
from s9_fastai.augment.policies import POLICIES, get_policy
from s9_fastai.augment.batch import BatchAugment, read_policy
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.loaders import cifar_block
from s9_fastai.cifar.facts import MEAN, SIZE, STD
from s9_fastai.augment.keys import item_keys
from s9_fastai.augment.pipelines import check_pipeline
from s9_fastai.cifar.readers import array_data
from s9_fastai.data.readers import PixelReader
import albumentations as A

names = dict(np=np, torch=torch, A=A, Image=Image, PILImage=PILImage, PILImageBW=PILImageBW, PILMask=PILMask, TensorImage=TensorImage,
             TensorCategory=TensorCategory, Normalize=Normalize, Resize=Resize)
ends = r'(?: where |, else | with the values|, with |, for one image|, if its|, and look|; then | for no change|$)'


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return make()


def advice(e, after='use '):
    "The expression that the message `e` names behind `after`"
    found = re.search(after + '(.+?)' + ends, str(e))
    assert found, f'no advice in: {e}'
    return found[1]


def follow(x, accept, other=False, **known):
    "What `x` has become once the advice of each message has been followed, and `accept` no longer raises; `other`: follow what comes after 'else'"
    for _ in range(5):
        try: accept(x)
        except (TypeError, ValueError) as e:
            image = x
            if 'x = np.asarray(image)' in str(e): x = np.asarray(image)
            x = eval(advice(e, 'else ' if other and 'else ' in str(e) else 'use '), names | known | dict(x=x))
            if '; then PILImageBW.create' in str(e): x = PILImageBW.create(x)
        else: return x
    pytest.fail('the advice leads nowhere')


light = A.Compose([A.RandomBrightnessContrast((0, 0), (0, 0), p=1)])  # changes nothing
item = partial(AlbumentationsTransform(light, light), split_idx=0)
ramp = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3)  # (16, 16, 3), all grey levels in order


@pytest.fixture(scope='module')
def sample(): return load_cifar('sample')


@pytest.fixture(scope='module')
def read(sample): return PixelReader(array_data(sample))


def cifar_dls(data, *args, **kwargs):
    "As in `s9_fastai.cifar.loaders`, from images that are loaded already"
    n = len(data.train.labels) + len(data.test.labels)
    return cifar_block(data, *args, **kwargs).dataloaders(range(n), seed=0, num_workers=0, device='cpu')


# --- values

known = dict(black=0, white=2550)
numbers = [  # numpy array, what must be known, what it is in bytes
    ('bool', ramp > 99, {}, 255*(ramp > 99)),
    ('uint16', 257*ramp.astype(np.uint16), {}, ramp), ('uint16, big endian', (257*ramp.astype(np.uint16)).astype('>u2'), {}, ramp),
    ('uint16 of bytes', ramp.astype(np.uint16), {}, ramp), ('int16 of bytes', ramp.astype(np.int16), {}, ramp),
    ('int32', 10*ramp.astype(np.int32), known, ramp), ('int64', 10*ramp.astype(np.int64), known, ramp), ('uint32', 10*ramp.astype(np.uint32), known, ramp),
    ('int32 of bytes', ramp.astype(np.int32), {}, ramp), ('int64 of bytes', ramp.astype(np.int64), {}, ramp),
    ('int8', (ramp.astype(int) - 128).astype(np.int8), dict(black=-128, white=127), ramp),
    ('int16 below 0', 4*ramp.astype(np.int16) - 1000, dict(black=-1000, white=20), ramp),
    *((f'{dtype} to 1', (ramp/255).astype(dtype), {}, ramp) for dtype in ('float16', 'float32', 'float64')),
    *((f'{dtype} to 255', ramp.astype(dtype), {}, ramp) for dtype in ('float16', 'float32', 'float64')),
    ('float32, normalised', ((ramp/255 - MEAN)/STD).astype(np.float32), dict(black=-np.array(MEAN)/STD, white=(1 - np.array(MEAN))/STD), ramp),
    ('float32 with nan', np.where(ramp == 0, np.nan, ramp/255).astype(np.float32), {}, ramp),
]
each_number = pytest.mark.parametrize('x, given, bytes_', [o[1:] for o in numbers], ids=[o[0] for o in numbers])


@each_number
def test_numbers_of_an_item(x, given, bytes_): np.testing.assert_array_equal(follow(x, item, **given), bytes_)


@each_number
def test_numbers_to_predict(x, given, bytes_, read):
    out = follow(x, read, **given)
    np.testing.assert_array_equal(out, bytes_)
    assert (read(out) == read(np.asarray(bytes_, np.uint8))).all()


@each_number
def test_numbers_of_a_batch(x, given, bytes_):
    x = TensorImage(torch.from_numpy(x.astype(x.dtype.newbyteorder('='))).permute(2, 0, 1)[None])
    given = {k: torch.as_tensor(np.asarray(v, np.float32)).view(-1, 1, 1) for k, v in given.items()}
    out = follow(x, partial(BatchAugment([]), split_idx=0), **given)
    assert (out[0].permute(1, 2, 0).numpy() == bytes_).all()


def test_bfloat16_of_a_batch():
    x = TensorImage(torch.arange(256.).view(1, 1, 16, 16)).bfloat16()
    assert (follow(x, partial(BatchAugment([]), split_idx=0)).flatten() == torch.arange(256)).all()


def test_another_white_of_whole_numbers():
    x = np.minimum(4095, 16*ramp.astype(np.uint16) + 15)  # 12 bits
    assert abs(follow(x, item, other=True, black=15, white=4095).astype(int) - ramp).max() == 0
    assert abs(follow(ramp//2, lambda x: item(x.astype(np.int64)) if x.max() < 255 else item(x), other=True, black=0, white=127) - ramp.astype(int)).max() <= 2


def test_arrays_of_no_numbers():
    for x in (ramp.astype(object), ramp.astype(str), ramp.astype(complex)): np.testing.assert_array_equal(follow(x, item), ramp)


# --- shapes

shapes = {
    'channels first': ramp.transpose(2, 0, 1), 'a batch of one': ramp[None], 'batches of batches': ramp[None, None], 'a row of pixels': ramp.ravel(),
    'floats, channels first': (ramp/255).transpose(2, 0, 1)}


@pytest.mark.parametrize('name', shapes)
def test_shapes(name, read):
    for accept in (item, read): np.testing.assert_array_equal(follow(shapes[name], accept, height=16, width=16, channels=3), ramp)


@pytest.mark.parametrize('n, left', [(2, 1), (13, 3)])
def test_channels_to_predict(n, left, read): assert follow(np.zeros((9, 9, n), np.uint8), read).shape == (9, 9, left)


def test_any_number_of_channels_passes_augmentation():
    for n in (1, 2, 5, 13): assert item(np.zeros((9, 9, n), np.uint8)).shape == (9, 9, n)


def test_an_array_without_pixels_is_refused():
    for shape in ((0, 5, 3), (0,), (5, 0)):
        with pytest.raises(ValueError, match='at least 1x1 pixels are needed'): item(np.zeros(shape, np.float32))


def test_shapes_of_a_batch():
    x, batch = TensorImage(torch.from_numpy(ramp).permute(2, 0, 1)), partial(BatchAugment([]), split_idx=0)
    for y in (x, x[None][None], x[None].permute(0, 2, 3, 1), (x/255)[None]): assert (follow(y, batch) == x[None]).all()
    with pytest.raises(ValueError, match='give at least one image of 1x1 pixels'): batch(x[None][:0])
    batch(x[None][:1])


# --- modes of PIL images

def in_mode(mode):
    "All grey levels as a PIL image of `mode`, and what it is in bytes"
    grey = Image.fromarray(ramp[..., 0])
    if mode == 'LAB':
        return ImageCms.profileToProfile(grey.convert('RGB'), ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), outputMode='LAB')
    if mode == 'I;16': return Image.fromarray(257*ramp[..., 0].astype(np.uint16))
    if mode == 'I;16B': return Image.frombytes(mode, (16, 16), (257*ramp[..., 0].astype('>u2')).astype('>u2').tobytes())
    if mode in ('I', 'F'): return Image.fromarray((10*ramp[..., 0].astype(int)).astype('int32' if mode == 'I' else 'float32'))
    first = {'La': 'LA', 'RGBa': 'RGBA', 'PA': 'P', 'P': 'L'}.get(mode, 'RGB')
    return grey.convert(first).convert(mode)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'P', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I', 'F', 'I;16', 'I;16B', 'LA', 'PA', 'La', 'RGBa', 'RGBX', 'LAB'])
def test_modes(mode):
    out = follow(PILImage(in_mode(mode)), item, black=0, white=2550)
    x = ToTensor()(item(out))
    assert isinstance(x, TensorImage) and x.dtype == torch.uint8
    assert abs(x.permute(1, 2, 0).numpy().astype(int) - ramp[..., :len(x)]).max() <= {'LAB': 2, 'YCbCr': 1}.get(mode, 0)


def test_the_mode_of_one_bit():
    bits = Image.fromarray(ramp[..., 0] > 99)
    out = follow(PILImageBW(bits), item)
    assert type(out) is PILImageBW and (np.asarray(out) == 255*(ramp[..., 0] > 99)).all()


@pytest.mark.parametrize('mode', ['I', 'F'])
def test_modes_to_predict(mode, read):
    out = follow(in_mode(mode), read, black=0, white=2550)
    assert (np.asarray(out) == ramp[..., 0]).all()


# --- masks, whose numbers are classes

classes = np.arange(12, dtype=np.uint8).reshape(3, 4)


def masks():
    palette = Image.fromarray(classes)
    palette.putpalette(np.random.default_rng(0).permutation(36).astype(np.uint8).tobytes())
    rgb = palette.convert('RGB')
    colours = np.array(palette.getpalette()).reshape(-1, 3)[:12]
    alpha = Image.merge('LA', (Image.fromarray(classes), Image.new('L', (4, 3), 255)))
    return {'L': (Image.fromarray(classes), classes), 'P': (palette, classes), '1': (Image.fromarray(classes > 5), classes > 5), 'LA': (alpha, classes),
            'I;16': (Image.fromarray(classes.astype(np.uint16)), classes), 'I': (Image.fromarray(classes.astype(np.int32)), classes),
            'F': (Image.fromarray(classes.astype(np.float32)), classes), 'RGB': (rgb, classes), 'colours': colours}


@pytest.mark.parametrize('mode', ['L', 'P', '1', 'LA', 'I;16', 'I', 'F', 'RGB'])
def test_masks_keep_their_classes(mode):
    mask, expected = masks()[mode]
    flip, img = AlbumentationsTransform(A.Compose([A.HorizontalFlip(p=1)])), PILImage.create(np.zeros((3, 4, 3), np.uint8))
    out = follow(PILMask(mask), lambda m: flip((img, m), split_idx=0), colours=masks()['colours'])
    assert mode not in ('L', 'P', '1') or out is mask or out.mode == mode  # taken as they are
    moved = flip((img, out), split_idx=0)[1]
    np.testing.assert_array_equal(ToTensor()(moved).numpy(), expected[:, ::-1])
    np.testing.assert_array_equal(ToTensor()(out).numpy(), expected)  # what validation gets has the same classes


# --- types

def test_types(tmp_path):
    Image.fromarray(ramp).save(path := tmp_path/'a.png')
    for x in (path, str(path), path.read_bytes(), Image.open(path), TensorImage(torch.from_numpy(ramp).permute(2, 0, 1)),
              TensorImage(torch.from_numpy(ramp).permute(2, 0, 1))/255, torch.from_numpy(ramp[..., 0]), TensorMask(torch.from_numpy(ramp[..., 0]))):
        out = np.asarray(follow(x, item))
        np.testing.assert_array_equal(out, ramp if out.ndim == 3 else ramp[..., 0])
    x = Image.open(path)
    assert type(follow(x, item)) is PILImage and type(x) is not PILImage  # the caller's stays as it was
    for x in ({'a': 1}, None, 3, [1, 2], (1, 2)):
        with pytest.raises(TypeError, match=f'got {type(x).__name__}: the first part of an item must be an image'): item((x, 'cat'))
    item((PILImage.create(ramp), {'a': 1}))


def get_image(i): return ramp
def get_label(i): return i % 2


def image_block(**kwargs):
    return DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=range, get_x=get_image, get_y=get_label, splitter=IndexSplitter(range(8)), **kwargs)


def batch_of(block, n=16, bs=8):
    dls = block.dataloaders(n, bs=bs, num_workers=0, device='cpu')
    return dls.train.one_batch(), dls.valid.one_batch()


def test_among_the_item_tfms_before_totensor():
    after = AlbumentationsTransform(light)
    after.order = ToTensor.order + 1
    with pytest.raises(TypeError, match='got TensorImage: put it among the item_tfms, before ToTensor'): batch_of(image_block(item_tfms=after))
    (x, _), (v, _) = batch_of(image_block(item_tfms=AlbumentationsTransform(light)))
    assert torch.equal(x[0], v[0]) and (x[0]*255).round().permute(1, 2, 0).numpy().tolist() == ramp.tolist()


def test_among_the_batch_tfms_before_inttofloat():
    after = BatchAugment([])
    after.order = IntToFloatTensor.order + 1
    with pytest.raises(ValueError, match='put it among the batch_tfms, before IntToFloatTensor'): batch_of(image_block(batch_tfms=after))
    (x, _), (v, _) = batch_of(image_block(batch_tfms=BatchAugment([])))
    assert torch.equal(x[0], v[0])


def test_types_of_a_batch():
    x, batch = torch.from_numpy(ramp).permute(2, 0, 1)[None], partial(BatchAugment([]), split_idx=0)
    for y in (x, TensorImageBase(x), x.numpy(), x/255): assert (follow(y, batch) == x).all()
    for y in (TensorCategory(3), [1], None, {}):
        with pytest.raises(TypeError, match='images must be the first part of a batch, as with ImageBlock'): batch((y, 1))
    with pytest.raises(TypeError, match='for tuples of images use AlbumentationsTransform'): batch(((TensorImage(x), TensorImage(x)), 1))
    a, b = item(((ramp, ramp), 1))[0]
    assert (a == ramp).all() and (b == ramp).all()


def test_keys_for_each_image_or_none():
    x = TensorImage(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    x.keys = item_keys(0, 0, range(9))
    with pytest.raises(ValueError, match='9 keys for 5 images: give x.keys one for each, or delete it'): BatchAugment([])(x, split_idx=0)
    x.keys = item_keys(0, 0, range(5))
    BatchAugment([])(x, split_idx=0)
    del x.keys
    BatchAugment([])(x, split_idx=0)


# --- pipelines

def test_wrap_it_in_a_compose():
    for x in (A.HorizontalFlip(p=1), [A.HorizontalFlip(p=1)], (A.HorizontalFlip(p=1),)):
        np.testing.assert_array_equal(AlbumentationsTransform(follow(x, check_pipeline))(ramp, split_idx=0), ramp[:, ::-1])
    for x in (None, lambda image: image): assert AlbumentationsTransform(follow(x, check_pipeline))(ramp, split_idx=0) is not None


@pytest.mark.parametrize('make', [lambda: A.CoarseDropout(max_holes=1), lambda: A.HorizontalFlip(always_apply=True), lambda: A.Affine(shift_limit=1)])
def test_the_arguments_that_are_named_are_known(make):
    t = quietly(make)
    with pytest.raises(ValueError, match='its arguments are') as e: check_pipeline(A.Compose([t]))
    args = re.search('its arguments are (.+)', str(e.value))[1].split(', ')
    check_pipeline(A.Compose([type(t)(**{k: getattr(t, k) for k in args if getattr(t, k, None) is not None})]))


def bright(i):
    "An image with one bright spot in its upper left quarter"
    img = np.zeros((32, 32, 3), np.uint8)
    img[4:8, 6:10] = 255
    return img


def spot(i): return np.array([[7.5, 5.5]])  # x, y
def box(i): return [[6, 4, 10, 8]]
def box_label(i): return ['spot']
def spot_mask(i): return bright(i)[..., 0]//255


def where(img):
    "Centre of the bright spot as fastai counts places: x and y from -1 to 1"
    ys, xs = np.nonzero(img[0].numpy() > 0.5)
    return torch.tensor([[(xs.min() + xs.max())/2, (ys.min() + ys.max())/2]])*2/32 - 1


flips = aug_transforms(max_rotate=0, max_zoom=1, max_warp=0, max_lighting=0, flip_vert=True)


@pytest.mark.parametrize('params, message, remedy', [
    (dict(keypoint_params=A.KeypointParams('xy')), "remove_invisible=True, .*: give A.KeypointParams.'xy', remove_invisible=False", dict(keypoint_params=A.KeypointParams('xy', remove_invisible=False))),
    (dict(bbox_params=A.BboxParams('coco')), "format='coco', .*: give A.BboxParams.'pascal_voc'", dict(bbox_params=A.BboxParams('pascal_voc'))),
    (dict(additional_targets={'image2': 'image'}), 'Compose has additional_targets, but .*: leave that out', {})], ids=['points', 'boxes', 'others'])
def test_targets_of_a_pipeline(params, message, remedy):
    def pipe(params): return quietly(lambda: A.Compose([A.ColorJitter()], **params))
    for make in (AlbumentationsTransform, partial(AlbumentationsTransform, light)):
        with pytest.raises(ValueError, match=message): make(pipe(params))
        make(pipe(remedy))


@pytest.mark.parametrize('blocks, get_y', [((ImageBlock, PointBlock), spot), ((ImageBlock, BBoxBlock, BBoxLblBlock), [box, box_label]),
                                           ((ImageBlock, MaskBlock), spot_mask), ((ImageBlock, ImageBlock), bright)], ids=['points', 'boxes', 'mask', 'image'])
def test_aug_transforms_move_both(blocks, get_y):
    "What the messages recommend for points, boxes and masks, beside colours from albumentations"
    block = DataBlock(blocks=blocks, get_items=range, get_x=bright, get_y=get_y, splitter=IndexSplitter([0]), n_inp=1,
                      item_tfms=AlbumentationsTransform(A.Compose([A.RandomGamma(p=1)])), batch_tfms=flips)
    x, y, *_ = block.dataloaders(65, bs=64, num_workers=0, device='cpu').train.one_batch()
    places = torch.stack([where(o) for o in x])
    assert len(places.unique(dim=0)) > 4  # flips and quarter turns
    if isinstance(y, TensorMask): assert ((x[:, 0] > 0.5) == (y == 1)).all()
    elif isinstance(y, TensorImage): assert ((x[:, 0] > 0.5) == (y[:, 0] > 0.5)).all()
    else:
        y = y.as_subclass(torch.Tensor)
        if y.shape[-1] == 4: y = (y[..., :2] + y[..., 2:])/2
        assert (y - places).abs().max() < 0.1


# --- targets in places

@pytest.mark.parametrize('y', [TensorMask(torch.zeros(16, 16)), np.zeros((16, 16)), torch.zeros(3, 4), PILImage.create(ramp)], ids=lambda y: type(y).__name__)
def test_take_it_out(y):
    pipe = A.Compose([A.ColorJitter(), A.OneOf([A.Rotate(), A.Blur()])])
    with pytest.raises(TypeError, match='take Rotate out') as e: AlbumentationsTransform(pipe)((PILImage.create(ramp), y), split_idx=0)
    out = re.search('take (.+?) out', str(e.value))[1].split(', ')
    rest = A.Compose([t for t in (*pipe[:1], *pipe[1].transforms) if type(t).__name__ not in out])
    assert AlbumentationsTransform(rest)((PILImage.create(ramp), y), split_idx=0)[1] is y
    if 'make it ' in str(e.value):
        y = eval(advice(e.value, 'make it '), names | dict(y=y))
        assert AlbumentationsTransform(pipe)((PILImage.create(ramp), y), split_idx=0)[1] is y


@pytest.mark.parametrize('y', [TensorPoint(torch.zeros(2, 1, 2)), torch.zeros(2, 4, 5)], ids=lambda y: type(y).__name__)
def test_take_it_out_of_a_batch(y):
    x = TensorImage(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    pipe = A.Compose([A.RandomBrightnessContrast(), A.HorizontalFlip(), A.CenterCrop(8, 8)])
    with pytest.raises(TypeError, match='take BatchFlip, BatchCrop out') as e: BatchAugment.from_compose(pipe)((x, y), split_idx=0)
    assert BatchAugment([op for op in read_policy(pipe) if type(op).__name__ not in ('BatchFlip', 'BatchCrop')])((x, y), split_idx=0)[1] is y
    if 'make it ' in str(e.value):
        y = eval(advice(e.value, 'make it '), names | dict(y=y))
        assert quietly(lambda: BatchAugment.from_compose(pipe)((x, y), split_idx=0))[1] is y


# --- training and validation alike

def splits(*args, batch_tfms=None, item_tfms=()):
    "The image of a training and of a validation batch"
    block = image_block(item_tfms=[*item_tfms, AlbumentationsTransform(*args)] if args else [*item_tfms], batch_tfms=batch_tfms)
    (x, _), (v, _) = batch_of(block)
    return x, v


normalize = A.Normalize(MEAN, STD)


@pytest.mark.parametrize('train, valid', [
    ([normalize], None), ([normalize], []), ([], [normalize]), ([normalize], [A.Normalize()]), ([A.ToFloat()], None), ([A.FromFloat()], None),
    ([A.Sequential([normalize], p=1)], None), ([A.ToFloat(), A.FromFloat(), A.ToFloat()], [])], ids=str)
def test_scaling_of_one_split_alone(train, valid):
    train, valid = A.Compose(train), valid if valid is None else A.Compose(valid)
    with pytest.raises(ValueError, match='so their scales differ: leave it out') as e: AlbumentationsTransform(train, valid)
    assert 'or give AlbumentationsTransform the same in train and valid' in str(e.value)
    mean, std = MEAN, STD
    left_out = splits(A.Compose([]), batch_tfms=eval(advice(e.value, 'put fastai\'s ').split(' among')[0], names | dict(mean=mean, std=std)))
    same = splits(A.Compose([normalize, A.ToTensorV2()]), A.Compose([normalize, A.ToTensorV2()]))
    for a, b in (left_out, same): assert torch.equal(a, b)
    np.testing.assert_allclose(left_out[0].numpy(), same[0].numpy(), atol=1e-5)


@pytest.mark.parametrize('augment', ['item', 'batch'])
def test_scaling_in_a_policy_of_cifar(augment, sample):
    with pytest.raises(ValueError, match=r'put fastai.s Normalize.from_stats\(mean, std\) among the batch_tfms \(cifar_dls does so\)'):
        cifar_dls(sample, A.Compose([normalize]), augment)
    dls = cifar_dls(sample, A.Compose([]), augment)
    x, y = (dl.one_batch()[0] for dl in dls)
    assert max(abs(o.mean()) for o in (x, y)) < 0.2 and max(abs(o.std() - 1) for o in (x, y)) < 0.2


@pytest.mark.parametrize('pipe', [
    A.Compose([A.Normalize(p=0.5)]), A.Compose([A.Normalize()], p=0.5), A.Compose([A.OneOf([A.Normalize(), A.Blur()], p=1)]),
    A.Compose([A.Sequential([A.Normalize()], p=0.5)])], ids=['p', 'Compose', 'OneOf', 'Sequential'])
def test_scaling_of_some_images(pipe):
    with pytest.raises(ValueError, match='Normalize is for some images only.* give it p=1, as all that it is in, outside of OneOf and SomeOf'): AlbumentationsTransform(pipe, pipe)
    whole = A.Compose([A.Sequential([A.Normalize(p=1)], p=1)])
    AlbumentationsTransform(whole, whole)


def test_tofloat_that_is_undone():
    a, b = splits(A.Compose([A.ToFloat(), A.RandomBrightnessContrast(0, 0), A.FromFloat()]))
    assert torch.equal(a, b)


def divided(x, **kwargs): return x/np.float32(255)
def two_channels(x, **kwargs): return x[..., :2]


@pytest.mark.parametrize('end', [
    A.ToGray(num_output_channels=1, p=1), A.Lambda(image=divided, p=1), A.Lambda(image=two_channels, p=1)],
    ids=['channels', 'dtype', 'two channels'])
def test_another_kind_of_image_in_training(end):
    pipe, img = A.Compose([A.HorizontalFlip(), end]), ramp
    tfm = AlbumentationsTransform(pipe)
    for _ in range(2):
        with pytest.raises(ValueError, match='a training image comes out as .*give AlbumentationsTransform a valid that ends like train'): tfm(img, split_idx=0)
    alike = AlbumentationsTransform(pipe, A.Compose([end]))
    a, b = (alike(img, split_idx=s) for s in (0, 1))
    assert (type(a), a.dtype, a.shape) == (type(b), b.dtype, b.shape)


def test_totensor_of_one_split_is_harmless():
    for pil in (PILImage.create(ramp), PILImageBW.create(ramp[..., 0])):
        tfm = AlbumentationsTransform(A.Compose([A.ToTensorV2()]))
        a, b = (ToTensor()(tfm(pil, split_idx=s)) for s in (0, 1))
        assert type(a) is type(b) and torch.equal(a, b)
    assert torch.equal(*splits(A.Compose([A.ToTensorV2()])))


def test_sizes():
    crop = A.Compose([A.RandomCrop(8, 12)])
    with pytest.warns(UserWarning, match='training images come out with 8x12 pixels, validation images with 16x16') as w: splits_of_size(crop)
    assert len(w) == 1
    text = str(w[0].message)
    size = eval(advice(text, 'end valid with ').split(', or')[0], names)
    back = eval(advice(text, 'or train with ').split(';')[0], names)
    meant = eval(advice(text, 'give valid='), names)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert splits_of_size(crop, A.Compose([size])) == [(8, 12), (8, 12)]
        assert splits_of_size(A.Compose([*crop, back])) == [(16, 16), (16, 16)]
        assert splits_of_size(crop, meant) == [(8, 12), (16, 16)]
        assert splits_of_size(A.Compose([A.RandomResizedCrop((12, 12))]), A.Compose([A.Resize(14, 14), A.CenterCrop(12, 12)])) == [(12, 12)]*2
        assert splits_of_size(A.Compose([A.RandomCrop(8, 8)]), item_tfms=[Resize(8)]) == [(8, 8)]*2
    with pytest.warns(UserWarning, match='validation images with 16x16'): splits_of_size(crop, A.Compose([A.RandomBrightnessContrast()]))


def splits_of_size(*args, **kwargs): return [tuple(o.shape[2:]) for o in splits(*args, **kwargs)]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_sizes_are_named_once_where_the_loaders_are_made(num_workers):
    block = image_block(item_tfms=AlbumentationsTransform(A.Compose([A.RandomCrop(8, 8)])))
    with pytest.warns(UserWarning, match='training images come out with 8x8'): dls = block.dataloaders(32, bs=8, num_workers=num_workers, device='cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for _ in range(2): assert [tuple(x.shape[2:]) for x, _ in dls.train] == [(8, 8)]*3


def test_a_turned_image_has_the_same_size():
    tfm = AlbumentationsTransform(A.Compose([A.Transpose(p=1)]))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert tfm(ramp[:9], split_idx=0).shape == (16, 9, 3)


def test_the_comparison_draws_nothing_from_the_item():
    "The second image of a first item is drawn as if nothing had been compared"
    noise = A.Compose([A.PixelDropout(dropout_prob=0.5, p=1)])
    first, later = AlbumentationsTransform(noise, noise), AlbumentationsTransform(noise, noise)
    later.is_compared = True
    outs = []
    for tfm in (first, later):
        np.random.seed(0)
        tfm.rng.rekey = partial(type(tfm.rng).rekey, tfm.rng, 7)
        outs.append(tfm(((ramp, ramp), 1), split_idx=0)[0])
    for a, b in zip(*outs): np.testing.assert_array_equal(a, b)


def test_sizes_of_batches():
    x, crop = TensorImage(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), BatchAugment.from_compose(A.Compose([A.RandomCrop(8, 12)]))
    with pytest.warns(UserWarning, match='training images come out with 8x12 pixels, validation images with 16x16') as w: crop(x, split_idx=0)
    text = str(w[0].message)
    resize = eval(advice(text, 'with one size |give all images one size with ').split(' among')[0], names)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        crop(x, split_idx=0)  # once
        new = BatchAugment.from_compose(A.Compose([A.RandomCrop(8, 12)]))
        (x, _), (v, _) = batch_of(image_block(item_tfms=resize, batch_tfms=new))
        assert x.shape == v.shape == (8, 3, 8, 12)
        BatchAugment.from_compose(get_policy('flip_crop', SIZE, MEAN))(TensorImage(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), split_idx=0)


def test_images_of_many_sizes_in_a_batch(sample):
    random = A.RandomScale((-0.5, 0.5), p=1)
    with pytest.raises(ValueError, match='end it with a crop or resize to one size'):
        quietly(lambda: cifar_dls(sample, A.Compose([random])).one_batch())
    for end in ([A.Resize(32, 32)], [A.PadIfNeeded(32, 32), A.CenterCrop(32, 32)]):
        assert cifar_dls(sample, A.Compose([random, *end])).one_batch()[0].shape[2:] == (32, 32)


def test_policies_that_are_named():
    with pytest.raises(ValueError, match='but must be ') as e: get_policy('flipcrop', SIZE, MEAN)
    named = re.findall(r"'(\w+)'", str(e.value).partition('must be ')[2])
    assert named == [*POLICIES] and all(isinstance(get_policy(o, SIZE, MEAN), A.Compose) for o in named)


# --- whole batches; `test_batch_augment` augments item by item what has no twin

@pytest.mark.parametrize('pipe', [A.ReplayCompose([A.HorizontalFlip()]), A.Sequential([A.HorizontalFlip()]), A.OneOf([A.HorizontalFlip()])], ids=lambda p: type(p).__name__)
def test_other_compositions_item_by_item_instead(pipe):
    with pytest.raises(ValueError, match=r"with AlbumentationsTransform \(augment='item'\)"): BatchAugment.from_compose(pipe)
    AlbumentationsTransform(pipe)(ramp, split_idx=0)


@pytest.mark.parametrize('make', [partial(A.RandomCrop, 8, 8), partial(A.CenterCrop, 8, 8), partial(A.PadIfNeeded, 20, 20)], ids=lambda f: f.func.__name__)
def test_give_it_p_1(make):
    with pytest.raises(ValueError, match='p is 0.5, but .*: give it p=1$'): BatchAugment.from_compose(A.Compose([make(p=0.5)]))
    with pytest.raises(ValueError, match='p of Compose is 0.5, .*: give Compose p=1$'): BatchAugment.from_compose(A.Compose([make(p=1)], p=0.5))
    BatchAugment.from_compose(A.Compose([make(p=1)], p=1))


def test_put_totensor_last_or_leave_it_out():
    with pytest.raises(ValueError, match='ToTensorV2 must end a policy: put it last, or leave it out'): BatchAugment.from_compose(A.Compose([A.ToTensorV2(), A.HorizontalFlip()]))
    for pipe in ([A.HorizontalFlip(), A.ToTensorV2()], [A.HorizontalFlip()]): assert len(BatchAugment.from_compose(A.Compose(pipe)).ops) == 1


def test_put_a_pad_before_it():
    x = TensorImage(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match='the crop is 20x12, but the images are 16x16: put a ') as e:
        quietly(lambda: BatchAugment.from_compose(A.Compose([A.RandomCrop(20, 12)]))(x, split_idx=0))
    pad = eval('A.' + re.search('put a (.+) before it', str(e.value))[1], names)
    assert quietly(lambda: BatchAugment.from_compose(A.Compose([pad, A.RandomCrop(20, 12)]))(x, split_idx=0)).shape == (2, 3, 20, 12)
    with pytest.raises(ValueError, match='put a PadIfNeeded before it'): BatchAugment.from_compose(A.Compose([A.RandomCrop(20, 12, pad_if_needed=True)]))


def test_smaller_holes_and_fills_for_the_channels():
    x = TensorImage(torch.full((2, 3, 16, 16), 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match='give smaller holes'): BatchAugment.from_compose(A.Compose([A.CoarseDropout((1, 1), (20, 30), (4, 8), p=1)]))(x, split_idx=0)
    BatchAugment.from_compose(A.Compose([A.CoarseDropout((1, 1), (16, 16), (4, 8), p=1)]))(x, split_idx=0)
    with pytest.raises(ValueError, match='the images have 3 channels: give one number, or 3'): BatchAugment.from_compose(A.Compose([A.CoarseDropout(fill=(1, 2), p=1)]))(x, split_idx=0)
    with pytest.raises(ValueError, match='from 0 to 255: give such numbers'): BatchAugment.from_compose(A.Compose([A.CoarseDropout(fill=300)]))
    for fill in (0, 255, 7, (1, 2, 3)): BatchAugment.from_compose(A.Compose([A.CoarseDropout(fill=fill, p=1)]))(x, split_idx=0)


# --- readers

def test_numbers_files_and_data_that_are_there(read, tmp_path):
    with pytest.raises(IndexError, match='give a number from 0 to ') as e: read(10**9)
    assert read(int(re.search(r'from 0 to (\d+)', str(e.value))[1])).shape == read(0).shape == (32, 32, 3)
    with pytest.raises(FileNotFoundError, match='give an image file'): read(tmp_path)
    Image.fromarray(ramp).save(tmp_path/'a.png')
    assert read(tmp_path/'a.png').shape == (32, 32, 3)
    with pytest.raises(ValueError, match='at least 1x1 are needed'): read(Image.new('RGB', (0, 5)))
    assert read(Image.new('RGB', (1, 1))).shape == (32, 32, 3)


def test_images_or_files_in_place_of_other_data(read, sample, tmp_path, monkeypatch):
    monkeypatch.setattr('s9_fastai.cifar.readers.load_cifar', lambda source: sample)
    twin = PixelReader(array_data(sample))
    twin._parts, twin.key = None, 'of other images'
    with pytest.raises(ValueError, match='these are other images than before; give images or files'): twin(0)
    Image.fromarray(ramp).save(tmp_path/'a.png')
    for o in (PILImage.create(ramp), ramp, tmp_path/'a.png'): assert (twin(o) == read(o)).all()


def test_make_it_smaller(read, monkeypatch, tmp_path):
    Image.fromarray(ramp).save(tmp_path/'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match='at most 100 are allowed; make it smaller'): read(tmp_path/'a.png')
    Image.fromarray(ramp).resize((10, 10)).save(tmp_path/'a.png')
    assert read(tmp_path/'a.png').shape == (32, 32, 3)
