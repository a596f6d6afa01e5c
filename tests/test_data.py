"""The DataLoaders of CIFAR-10: what a batch is, who is augmented, and draws that depend on (seed, epoch, image) alone"""
import hashlib
import os
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from fastai.data.core import TfmdDL
from fastai.data.load import fa_collate
from fastai.callback import progress  # its import gives every Learner its bars
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorCategory, TensorImage, set_seed
from fasttransform import Transform
from PIL import Image

from s9_fastai.augment.item import AlbumentationsTransform, AlternatingFlip
from s9_fastai.cifar.facts import CLASSES, MEAN, STD, Cifar10, Split
from s9_fastai.cifar.load import load_cifar
from s9_fastai.augment.keyed import KeyedDL
from s9_fastai.cifar.loaders import cifar_block, cifar_dls
from s9_fastai.data.arrays import ArrayDL
from s9_fastai.data.loader import RowNormalize
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.nets.net import Net
from s9_fastai.training.schedule import StepLR
from s9_fastai.cifar.readers import array_data
from s9_fastai.data.readers import ClassReader, PixelReader
from s9_fastai.data.readers import ImageArray
from s9_fastai.test_utils import synth_cifar
import albumentations as A
from albumentations.pytorch import ToTensorV2

n_train, n_test = 64, 40
noise = A.Compose([A.PixelDropout(dropout_prob=0.5, p=1)])  # 1024 random bits an image
light = A.Compose([A.RandomBrightnessContrast(p=1)])


@pytest.fixture(scope='module')
def tiny(): return synth_cifar(n_train, n_test)


@pytest.fixture(scope='module')
def sample(): return load_cifar('sample')


@pytest.fixture
def mk(tiny):
    "Make small DataLoaders"
    def _inner(policy='reference', bs=24, seed=1, num_workers=0, augment='item', **kwargs):
        return cifar_block(tiny, policy, augment).dataloaders(
            range(n_train + n_test), bs=bs, seed=seed, num_workers=num_workers, device='cpu', **{'drop_last': False, **kwargs})
    return _inner


def digests(dl): return [hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest() for x, y in dl]
def images(dl): return torch.cat([b[0] for b in dl])  # (N, 3, 32, 32)
def grey(x): return (x*torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])*255  # the plain inverse of Normalize


# --- batches

def test_uint8_up_to_the_batch_transforms_then_float_and_normalised(mk, tiny):
    dls, seen = mk('none'), []
    inner = dls.valid.after_batch
    dls.valid.after_batch = lambda b: seen.append(b) or inner(b)
    x, y = next(iter(dls.valid))
    raw = seen[0][0]
    assert (type(raw), raw.dtype, raw.shape) == (TensorImage, torch.uint8, (24, 3, 32, 32))
    np.testing.assert_array_equal(raw.permute(0, 2, 3, 1), tiny.test.images[:24])
    assert (type(x), x.dtype, type(y), y.dtype) == (TensorImage, torch.float32, TensorCategory, torch.int64)
    mean, std = (torch.tensor(o)[:, None, None] for o in (MEAN, STD))
    torch.testing.assert_close(torch.Tensor(x), (torch.Tensor(raw.float())/255 - mean)/std, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(y, tiny.test.labels[:24])


def test_normalize_is_fastais_and_is_undone_to_true_colours(mk, tiny):
    dls = mk('none')
    assert any(isinstance(t, Normalize) for t in dls.train.after_batch.fs)
    back, y = dls.valid.decode(next(iter(dls.valid)))
    diff = back.permute(0, 2, 3, 1).numpy().astype(int) - tiny.test.images[:24]
    assert abs(diff).max() <= 1
    shown = dls.valid.show_batch(show=False, max_n=9)[2]
    assert abs(np.stack([255*x.permute(1, 2, 0).numpy() if x.is_floating_point() else x.permute(1, 2, 0).numpy() for x, _ in shown])
               - tiny.test.images[:9].astype(float)).max() <= 1


def test_the_last_batch_is_kept(mk):
    dls = mk()
    assert [len(x) for x, _ in dls.train] == [24, 24, 16] and [len(x) for x, _ in dls.valid] == [24, 16]
    assert (len(dls.train), len(dls.valid)) == (3, 2)
    sample = cifar_dls('sample', device='cpu')
    assert (len(sample.train), len(sample.valid), sample.train.bs) == (16, 4, 128)
    assert (sample.c, list(sample.vocab)) == (10, list(CLASSES))


def test_391_batches_of_the_full_set(tmp_path):
    "Counted on arrays without content; the real ones need `S9_CIFAR10`"
    def blank(n): return Split(np.broadcast_to(np.uint8(0), (n, 32, 32, 3)), np.broadcast_to(np.int64(0), n))
    block = cifar_block(Cifar10(blank(50000), blank(10000), 'nowhere', ''))
    dls = block.dataloaders(range(60000), bs=128, device='cpu', drop_last=False)
    assert (len(dls.train), len(dls.valid)) == (391, 79)
    idxs = dls.train.get_idxs()
    assert sorted(idxs) == list(range(50000)) and len(idxs[390*128:]) == 80


@pytest.mark.skipif('S9_CIFAR10' not in os.environ, reason='S9_CIFAR10 does not say where CIFAR-10 is')
def test_the_real_set():
    dls = cifar_dls(device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.train), len(dls.valid)) == (50000, 10000, 391, 79)
    x, y = dls.one_batch()
    assert x.shape == (128, 3, 32, 32) and abs(x.mean()) < 0.5


def test_every_image_once_an_epoch_in_a_new_order(mk, tiny):
    dl = mk('none', bs=n_train).train
    labels, firsts = [], []
    for _ in range(4):
        x, y = next(iter(dl))
        ims = grey(x).round().permute(0, 2, 3, 1).numpy()
        order = [int(np.flatnonzero((tiny.train.images == im).all((1, 2, 3)))[0]) for im in ims]
        assert sorted(order) == list(range(n_train))
        np.testing.assert_array_equal(y, tiny.train.labels[order])
        firsts.append(tuple(order))
    assert len(set(firsts)) == 4


# --- who is augmented

def test_only_training_items_are_augmented(mk, tiny):
    dls, raw = mk(noise), images(mk('none').valid)
    assert torch.equal(images(dls.valid), raw)
    assert torch.equal(images(dls.valid), raw)
    assert torch.equal(images(dls.test_dl(range(n_train, n_train + n_test))), raw)
    pil = [Image.fromarray(o) for o in tiny.test.images]
    assert torch.equal(images(dls.test_dl(pil)), raw)
    assert torch.equal(images(dls.test_dl(range(5))), images(mk('none').test_dl(range(5))))  # a training image as a test item
    assert not torch.equal(images(dls.train), images(mk('none').train))


def test_test_dl_with_labels(mk, tiny, tmp_path):
    (tmp_path/'frog').mkdir()
    Image.fromarray(tiny.test.images[0]).save(tmp_path/'frog'/'1_frog.png')
    dls = mk()
    dl = dls.test_dl(range(n_train, n_train + n_test), with_labels=True)
    np.testing.assert_array_equal(torch.cat([b[1] for b in dl]), tiny.test.labels)
    for f in (tmp_path/'frog'/'1_frog.png', str(tmp_path/'frog'/'1_frog.png')):
        (x, y), = dls.test_dl([f], with_labels=True)
        assert y.tolist() == [CLASSES.index('frog')] and torch.equal(x[0], images(dls.valid)[0])


# --- (seed, epoch, image)

def test_three_epochs_repeat_no_draw(mk):
    for w in (0, 2):
        dl = mk(noise, num_workers=w).train
        draws = [(x == 0).all(0).numpy().tobytes() for _ in range(3) for xb in [grey(images(dl)).round()] for x in xb]
        assert len(set(draws)) == 3*n_train


def test_the_same_with_any_number_of_workers_and_another_with_another_seed(mk):
    ref = [digests(d) for dl in [mk(seed=7).train] for d in [dl]*3]
    for w in (1, 2): assert [digests(d) for dl in [mk(seed=7, num_workers=w).train] for d in [dl]*3] == ref
    assert not set(digests(mk(seed=8).train)) & set(sum(ref, []))


def test_the_batch_size_does_not_change_an_image(mk):
    a, b = images(mk(bs=24).train), images(mk(bs=10).train)
    assert torch.equal(a, b)


def test_a_second_process_makes_the_same_batches(mk):
    code = '''import hashlib
from s9_fastai.cifar.facts import Cifar10, Split
from s9_fastai.cifar.loaders import cifar_block
from s9_fastai.test_utils import synth_cifar
data = synth_cifar(64, 40)
dl = cifar_block(data).dataloaders(range(104), bs=24, seed=1, num_workers=1, device='cpu', drop_last=False).train
print(hashlib.sha256(b''.join(x.numpy().tobytes() for _ in range(2) for x, y in dl)).hexdigest())'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env={**os.environ, 'PYTHONHASHSEED': '7'},
                         check=True, capture_output=True)
    dl = mk().train
    assert out.stdout.decode().strip() == hashlib.sha256(b''.join(x.numpy().tobytes() for _ in range(2) for x, y in dl)).hexdigest()


def test_without_a_seed_it_follows_set_seed(mk):
    def make(s):
        set_seed(s)
        return digests(mk(seed=None).train)
    assert make(1) == make(1) != make(2)
    first = make(1)
    set_seed(1)
    mk(seed=None)
    assert digests(mk(seed=None).train) != first  # the next one is another


def test_looking_changes_nothing(mk):
    ref = mk()
    ref = digests(ref.train), digests(ref.train)
    dls = mk()
    looks = [dls.one_batch()[0] for _ in range(3)]
    assert not torch.equal(looks[0], looks[1])  # each look is a draw of its own
    dls.show_batch(show=False), list(dls.train.new()), dls.valid.one_batch(), list(dls.test_dl([1]))
    first = digests(dls.train)
    dls.one_batch(), list(dls.train.new())
    assert (first, digests(dls.train)) == ref


def test_an_epoch_that_is_broken_off_is_not_drawn_again(mk):
    dl, ref = mk().train, mk().train
    whole = [digests(ref), digests(ref)]
    next(iter(dl))
    assert digests(dl) == whole[1]


@pytest.mark.parametrize('num_workers', [1, 2])
def test_sampling_with_replacement_repeats_no_draw(mk, num_workers):
    "As `show_batch(unique=True)` or a weighted sampler do: one image many times in an epoch"
    def again(w): return images(mk(noise, num_workers=w).train.new(get_idxs=lambda: [3]*64, bs=8))
    ref = again(0)
    assert len({x.numpy().tobytes() for x in ref}) == 64
    assert torch.equal(again(num_workers), ref)


def test_unique_shows_draws_of_one_image(mk):
    dls = mk(noise)
    its = dls.train.show_batch(show=False, unique=True, max_n=8)[2]
    assert len({x.numpy().tobytes() for x, _ in its}) == 8 and len({str(y) for _, y in its}) == 1


def test_a_plain_loader_of_fastai_can_have_the_items(mk, tiny):
    dls = mk(noise)
    dl = TfmdDL(dls.train_ds, bs=16, after_item=dls.train.after_item, after_batch=dls.train.after_batch, num_workers=0)
    assert len({x.numpy().tobytes() for _ in range(2) for x in images(dl)}) == 2*n_train


# --- the short cut, and whole batches

crops = A.Compose([A.RandomCrop(24, 24), A.HorizontalFlip(), ToTensorV2()])  # smaller than validation images
floats = A.Compose([A.HorizontalFlip(), A.Normalize(MEAN, STD), ToTensorV2()])


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('policy', ['reference', 'none', noise, crops, floats], ids=['reference', 'none', 'noise', 'tensors', 'floats'])
@pytest.mark.filterwarnings('ignore:training images come out with 24x24')
def test_the_short_cut_is_fastais_way_to_the_bit(mk, policy, num_workers):
    short, long = (mk('none' if policy is floats else policy, num_workers=num_workers) for _ in range(2))
    if policy is floats:  # in both splits, which a policy alone cannot say
        for dls in (short, long):
            for dl in dls: dl.after_item.fs[0] = AlbumentationsTransform(floats, floats)
    for a, b in zip(short, long):
        b.is_direct = lambda: False
        assert a.is_direct()
        for _ in range(2):
            for (x, y), (u, v) in zip(a, b, strict=True):
                assert (type(x), x.dtype, x.stride(), type(y), y.dtype) == (type(u), u.dtype, u.stride(), type(v), v.dtype)
                assert torch.equal(x, u) and torch.equal(y, v)


class Corner(Transform):
    def encodes(self, o:ImageArray): return o[:24, :24]


def test_it_steps_aside_for_anything_else(mk, tiny):
    dls = mk()
    assert not dls.test_dl([Image.fromarray(tiny.test.images[0])]).is_direct()
    assert not dls.test_dl([3, Image.fromarray(tiny.test.images[0])]).is_direct()
    cut = cifar_block(tiny).new(item_tfms=Corner()).dataloaders(range(n_train + n_test), bs=8, num_workers=0)
    assert not cut.train.is_direct() and cut.one_batch()[0].shape == (8, 3, 24, 24)
    seen = []
    mine = dls.train.new(create_batch=lambda b: seen.append(len(b)) or fa_collate(b))
    assert not mine.is_direct() and len(list(mine)) == 3 and seen == [24, 24, 16]
    assert not dls.train.new(before_batch=lambda b: b[:5]).is_direct()
    assert not dls.train.new(retain=lambda res, b: res).is_direct()
    class Mine(ArrayDL):
        def create_batch(self, b): return super().create_batch(b[:3])
    assert [len(x) for x, _ in dls.train.new(cls=Mine)] == [3, 3, 3]


def test_images_of_many_sizes_are_an_error(mk):
    with pytest.warns(UserWarning, match='training images come out with 2'):
        dl = mk(A.Compose([A.OneOf([A.CenterCrop(20, 20), A.CenterCrop(24, 24)], p=1)])).train
    with pytest.raises(ValueError, match=r'2 sizes, such as \(20, 20, 3\) and \(24, 24, 3\)'): list(dl)


def test_whole_batches_the_same_with_any_number_of_workers(mk):
    ref = [digests(d) for dl in [mk(seed=7, augment='batch').train] for d in [dl]*3]
    for w in (1, 2): assert [digests(d) for dl in [mk(seed=7, augment='batch', num_workers=w).train] for d in [dl]*3] == ref
    assert not set(digests(mk(seed=8, augment='batch').train)) & set(sum(ref, []))
    assert len(set(sum(ref, []))) == 9


def test_in_whole_batches_each_image_has_its_own_draw(mk):
    "Draws go with (seed, epoch, image), so the size of the batches changes nothing but how floats are rounded"
    a, b = images(mk(augment='batch', bs=24).train), images(mk(augment='batch', bs=10).train)
    assert (grey(a).round() - grey(b).round()).abs().max() <= 1
    one = mk(augment='batch').train.new(get_idxs=lambda: [3]*64, bs=8)
    assert len({x.numpy().tobytes() for x in images(one)}) > 40  # of 64 draws of one image, some leave it as it is


def test_whole_batches_leave_the_test_images_alone(mk):
    dls, raw = mk(augment='batch'), mk('none')
    for ours, theirs in ((dls.valid, raw.valid), (dls.test_dl(range(5)), raw.test_dl(range(5)))):
        assert torch.equal(images(ours), images(theirs))
    assert not hasattr(dls.valid.one_batch()[0], 'keys')


def test_whole_batches_are_channels_last_uint8_up_to_the_batch_transforms(mk):
    dls, seen = mk(augment='batch'), []
    x, _ = dls.one_batch()
    assert x.is_contiguous(memory_format=torch.channels_last) and not hasattr(x, 'keys')
    class Spy(Transform):
        def encodes(self, x:TensorImage): return seen.append(x) or x
    dls.train.after_batch.fs.insert(0, Spy())
    next(iter(dls.train))
    assert (seen[0].dtype, seen[0].shape, len(seen[0].keys)) == (torch.uint8, (24, 3, 32, 32), 24)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('drop_last', [False, True])
def test_whole_batches_follow_the_seed_on_fastais_way_too(mk, drop_last):
    short, long = (mk(augment='batch', seed=5, drop_last=drop_last) for _ in range(2))
    long.train.is_direct = lambda: False
    for _ in range(2): assert digests(short.train) == digests(long.train)
    x, _ = long.train.do_batch([long.train_ds[0]])  # by hand: nobody knows the item's number
    assert not hasattr(x, 'keys')


def test_looking_at_whole_batches_changes_nothing(mk):
    ref, dls = digests(mk(augment='batch').train), mk(augment='batch')
    dls.show_batch(show=False), dls.one_batch(), dls.valid.show_batch(show=False)
    assert digests(dls.train) == ref
    its = dls.train.show_batch(show=False, unique=True, max_n=8)[2]
    assert len({x.numpy().tobytes() for x, _ in its}) > 4


# --- readers

@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'P', 'CMYK', '1'])
@pytest.mark.parametrize('size', [(32, 32), (90, 40), (7, 50)])
def test_images_of_any_mode_and_size(tiny, tmp_path, mode, size):
    im = Image.new('RGB', size, (0, 0, 0)).convert(mode)
    f = tmp_path/('im.png' if mode != 'CMYK' else 'im.tif')
    im.save(f)
    read = PixelReader(array_data(tiny))
    for o in (im, f, str(f)):
        x = read(o)
        assert (type(x), x.shape, x.dtype) == (ImageArray, (32, 32, 3), np.uint8) and not x.any()


@pytest.mark.parametrize('shape', [(32, 32, 3), (32, 32), (32, 32, 1), (40, 60, 3)])
def test_arrays(tiny, shape): assert PixelReader(array_data(tiny))(np.full(shape, 9, np.uint8)).tolist() == np.full((32, 32, 3), 9).tolist()


@pytest.mark.parametrize('bad', [np.zeros((32, 32, 3)), np.zeros((3, 32, 32), np.uint8), np.zeros((2, 32, 32, 3), np.uint8)],
                         ids=['float', 'channels first', 'batch'])
def test_arrays_it_cannot_read_are_named(tiny, bad):
    with pytest.raises((TypeError, ValueError), match='uint8'): PixelReader(array_data(tiny))(bad)


def test_readers_pickle_without_pixels_and_find_them_again(sample):
    for reader in (PixelReader(array_data(sample)), ClassReader(array_data(sample))):
        twin = pickle.loads(pickle.dumps(reader))
        assert len(pickle.dumps(reader)) < 1000
        np.testing.assert_array_equal(twin(2003), reader(2003))


def test_a_reader_does_not_take_other_data_for_its_own(tiny):
    "`tiny` says that it is the sample; another process would read the real one, without a word"
    twin = pickle.loads(pickle.dumps(PixelReader(array_data(tiny))))
    with pytest.raises(ValueError, match='sample'): twin(3)


def test_items_are_views_that_nobody_can_write_to(sample):
    x = PixelReader(array_data(sample))(3)
    with pytest.raises(ValueError, match='read-only'): x[0, 0] = 0


# --- arguments

@pytest.mark.parametrize('kw, msg', [(dict(bs=0), 'bs is 0'), (dict(bs=2.5), 'bs is 2.5'), (dict(bs=True), 'bs is True'),
                                     (dict(num_workers=-1), 'num_workers is -1'), (dict(seed=-1), 'seed is -1'), (dict(seed='1'), "seed is '1'"),
                                     (dict(policy='refrence'), "policy is 'refrence', but must be 'reference', "),
                                     (dict(augment='batches'), "augment is 'batches', but must be 'item' or 'batch'"),
                                     (dict(policy=noise, augment='batch'), "PixelDropout.*augment='item'")])
def test_bad_arguments(kw, msg):
    with pytest.raises(ValueError, match=msg): cifar_dls('sample', **kw)


def test_a_policy_of_your_own(mk):
    assert isinstance(mk(light).train, KeyedDL)
    with pytest.raises(TypeError, match=r'use A.Compose\(\[x\]\)'): mk(A.HorizontalFlip())


# --- plain means plain

def test_the_plain_way_is_fastais_own_to_the_bit(mk):
    "The recipe's `compute='plain'` against fastai's SGD and Normalize, and batches made item by item"
    def weights(ours):
        set_seed(0)
        dls = mk()
        if ours: learn = s9_learner(dls, get_recipe(compute='plain', wd=0.01))
        else:
            for dl in dls:
                dl.is_direct = lambda: False
                dl.after_batch.fs[:] = [Normalize.from_stats(MEAN, STD) if isinstance(t, RowNormalize) else t for t in dl.after_batch.fs]
            learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.9), lr=0.05, wd=0.01, cbs=StepLR())
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return learn.model.state_dict()
    a, b = weights(True), weights(False)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('augment', ['item', 'batch'])
def test_alternating_flips_show_both_sides_in_two_epochs(mk, tiny, augment, num_workers):
    dls = mk(A.Compose([AlternatingFlip()]), augment=augment, num_workers=num_workers)
    place = {im.tobytes(): (i, mirrored) for i, o in enumerate(tiny.train.images) for mirrored, im in enumerate((o, o[:, ::-1]))}
    turns = []
    for _ in range(3):
        x = grey(images(dls.train)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        turns.append([mirrored for _, mirrored in sorted(place[np.ascontiguousarray(o).tobytes()] for o in x)])
    assert len(turns[0]) == n_train and turns[0] == turns[2] and turns[1] == [1 - t for t in turns[0]] and 16 < sum(turns[0]) < 48
