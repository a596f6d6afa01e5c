"""Loaders whose draws depend on (seed, epoch, item) alone: any data set, any transform, any number and kind of workers"""
import copy
import multiprocessing
import operator
import pickle
import random
from multiprocessing.context import set_spawning_popen

import albumentations as A
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import Datasets, TfmdDL
from fastai.data.load import DataLoader, SkipItemException
from fastai.data.transforms import IndexSplitter, IntToFloatTensor, ToTensor
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.core import Categorify, TabDataLoader, TabularPandas
from fastai.text.data import LMDataLoader, SortedDL
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import RandomResizedCrop
from fastai.vision.core import PILImage, PILImageBW, PILMask
from fastai.vision.data import ImageBlock, MaskBlock
from fasttransform import ItemTransform, Transform
from torch import nn

from s9_fastai.augment.item import AlbumentationsTransform, KeyedRandom, AlternatingFlip
from s9_fastai.augment.batch import BatchAugment
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.cifar.facts import Cifar10, Split
from s9_fastai.cifar.loaders import cifar_block
from s9_fastai.data.arrays import ArrayDL
from s9_fastai.core.generators import random_kept
from s9_fastai.augment.keyed import KeyedDL, KeyedTransform, keyed_class, make_keyed
from s9_fastai.augment.keys import ItemKey, item_key, item_seed, seed_global, under_key
from s9_fastai.cifar.readers import array_data
from s9_fastai.data.readers import ClassReader, PixelReader
from s9_fastai.test_utils import synth_cifar, synth_images

n_items = 40
photos = np.random.default_rng(0).integers(0, 256, (n_items, 16, 16, 3), dtype=np.uint8)
noise = A.Compose([A.PixelDropout(dropout_prob=0.5, p=1)])  # 256 random bits an image


def photo(i): return photos[i]
def grey_photo(i): return photos[i, ..., 0]
def parity(i): return int(i) % 2
def three_draws(): return [random.random(), np.random.rand(), torch.rand(()).item()]


class Anybody(ItemTransform):
    "An item transform that draws from all three global generators and knows of no key"
    split_idx, order = 0, 1
    def encodes(self, x):
        r, n, t = three_draws()
        im = np.roll(np.asarray(x[0]), (int(16*r), int(16*n)), (0, 1))
        return (type(x[0]).create(255 - im if t < 0.5 else im), *x[1:])


class FloatDraws(Transform):
    "The item, and a draw from each global generator beside it"
    def encodes(self, x:float): return torch.tensor([x, *three_draws()], dtype=torch.float64)


def image_block(item_tfms=None, batch_tfms=None, dl_type=None, block=ImageBlock, get_x=photo, get_y=parity):
    return DataBlock(blocks=(block, CategoryBlock(vocab=[0, 1])), get_x=get_x, get_y=get_y, splitter=IndexSplitter(range(8)),
                     item_tfms=item_tfms, batch_tfms=batch_tfms, dl_type=dl_type)


def loaders(block, num_workers=0, bs=8, seed=0, **kwargs):
    set_seed(seed)
    return block.dataloaders(range(n_items), bs=bs, num_workers=num_workers, device='cpu', **{'drop_last': False, **kwargs})


def epochs(dl, n=2): return [torch.cat([b[0] if isinstance(b, tuple) else b for b in dl]) for _ in range(n)]
def equal(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
def floats(dl_type=KeyedDL, n=20, **kwargs): return dl_type([float(i) for i in range(n)], **{'bs': 4, 'num_workers': 0, 'after_item': FloatDraws(), **kwargs})


# --- fork, forkserver, spawn

@pytest.fixture
def started_by(request):
    "The start method of worker processes, for one test"
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    if request.param == 'forkserver': multiprocessing.set_forkserver_preload(['s9_fastai.cifar.loaders', 'fastai.vision.augment'])  # its workers start at once
    yield request.param
    multiprocessing.set_start_method(before, force=True)


every_method = pytest.mark.parametrize('started_by', multiprocessing.get_all_start_methods(), indirect=True)


@every_method
def test_two_workers_make_the_batches_of_none(started_by):
    """In a plain `DataBlock`, with a transform of fastai's beside ours, and workers that persist; nothing of this file, since a
    spawned worker would import it"""
    block = image_block([RandomResizedCrop(12), AlbumentationsTransform(noise)], BatchAugment.from_compose(A.Compose([A.HorizontalFlip()])),
                        get_x=photos.__getitem__, get_y=operator.truth)
    zero, two = (loaders(block, w, seed=3, persistent_workers=True).train for w in (0, 2))
    assert equal(epochs(two, 1), epochs(zero, 1))


@pytest.mark.parametrize('started_by', ['forkserver'], indirect=True)
def test_a_worker_has_the_data_of_cifar_block(started_by):
    "Made in memory under the name of the sample: a worker must not read the real one"
    tiny = synth_cifar(32, 10)
    zero, one = (cifar_block(tiny).dataloaders(range(42), bs=8, seed=1, num_workers=w, device='cpu').train for w in (0, 1))
    assert type(one) is ArrayDL and one.is_direct()
    assert equal(epochs(one, 1), epochs(zero, 1))


@pytest.mark.parametrize('keyed', [False, True])
def test_a_plain_loader_stays_plain_without_our_transforms(keyed):
    dls = loaders(image_block([Anybody(), *([AlbumentationsTransform(noise)] if keyed else [])]))
    assert [type(dl) for dl in dls] == [KeyedDL if keyed else TfmdDL]*2


class Spawning:
    "As while a worker process is started"
    def __enter__(self): set_spawning_popen(self)
    def __exit__(self, *args): set_spawning_popen(None)


def twin_in_worker(o):
    with Spawning(): return pickle.loads(pickle.dumps(o))


def test_a_reader_takes_mapped_arrays_along_by_name_and_others_by_value(tmp_path):
    ims, labels = synth_images(30)
    np.save(tmp_path/'ims.npy', ims)
    mapped = np.load(tmp_path/'ims.npy', mmap_mode='r')
    data = Cifar10(Split(mapped, labels), Split(mapped[20:], labels[20:]), str(tmp_path), 'key')
    for reader in (PixelReader(array_data(data)), ClassReader(array_data(data))):
        twin = twin_in_worker(reader)
        assert isinstance(twin.parts[0].images, np.memmap) and twin.parts[0].images.filename == mapped.filename
        for ours, theirs in zip(twin.parts, data[:2]):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
                assert not a.flags.writeable and a.dtype == b.dtype
    assert pickle.loads(pickle.dumps(PixelReader(array_data(data))))._parts is None  # a file has no pixels


def test_the_cache_is_not_copied_to_a_worker(tmp_path):
    with Spawning():
        sizes = [len(pickle.dumps(PixelReader(array_data(Cifar10(Split(a, a), Split(a, a), 'x', 'key')))))
                 for n in (10, 1000) for a in [np.lib.format.open_memmap(tmp_path/f'{n}.npy', 'w+', np.uint8, (n, 32, 32, 3))]]
    assert max(sizes) < 3000 and abs(sizes[0] - sizes[1]) < 50


def test_loaders_of_any_kind_can_be_pickled_and_copied():
    tiny = synth_cifar(32, 10)
    made = {'plain': lambda: loaders(image_block(AlbumentationsTransform(noise))).train,
            'mixed': lambda: floats(keyed_class(WeightedDL), wgts=range(20), shuffle=True, seed=1),
            'sorted': lambda: floats(keyed_class(SortedDL), sort_func=float, after_item=None, shuffle=True, seed=1),
            'cifar': lambda: cifar_block(tiny).dataloaders(range(42), bs=8, seed=1, num_workers=0, device='cpu').train}
    for nm, make in made.items():
        dl = make()
        epochs(dl, 1)  # one is over
        twins = twin_in_worker(dl), copy.deepcopy(dl) if nm != 'cifar' else twin_in_worker(dl)
        assert [type(o) for o in twins] == [type(dl)]*2, nm
        expected = epochs(dl)
        for twin in twins: assert equal(epochs(twin), expected), nm


@pytest.mark.parametrize('cls', [TfmdDL, WeightedDL], ids=['TfmdDL', 'WeightedDL'])
def test_an_exported_learner_opens_with_its_keyed_loaders(cls, tmp_path):
    from fastai.learner import load_learner
    block = image_block(AlbumentationsTransform(noise), [IntToFloatTensor()], dl_type=cls)
    dls = loaders(block)
    Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), loss_func=CrossEntropyLossFlat()).export(tmp_path/'model.pkl')
    dl = load_learner(tmp_path/'model.pkl').dls.test_dl([3])
    assert type(dl) is keyed_class(cls) and dl.one_batch()[0].shape == (1, 3, 16, 16)


# --- any data set and loader

@pytest.mark.parametrize('num_workers, bs', [(0, 3), (1, 50), (2, 8)])
def test_a_plain_datablock_draws_by_item(num_workers, bs):
    block = image_block([Anybody(), AlbumentationsTransform(noise)])
    ref, dls = (loaders(block, w, b, seed=5) for w, b in ((0, 8), (num_workers, bs)))
    dls.one_batch(), dls.train.new(bs=5, num_workers=0).one_batch()  # a look changes nothing
    got = epochs(dls.train)
    assert equal(got, epochs(ref.train))
    assert len({x.numpy().tobytes() for o in got for x in o}) == 2*32  # no draw twice
    other = epochs(loaders(block, seed=6).train)[0]
    assert not {x.numpy().tobytes() for x in other} & {x.numpy().tobytes() for x in got[0]}


@pytest.mark.parametrize('num_workers', [1, 2])
def test_a_loader_made_with_new_draws_by_item_too(num_workers):
    def of_new(w, bs): return epochs(loaders(image_block([Anybody(), AlbumentationsTransform(noise)])).new(num_workers=w, bs=bs))
    assert equal(of_new(0, 8), of_new(num_workers, 5))


def test_a_loader_with_its_own_do_item():
    class Mine(TfmdDL):
        def do_item(self, s): return self.after_item(self.create_item(s))
    block = image_block(AlbumentationsTransform(noise), dl_type=Mine)
    dls = loaders(block)
    assert isinstance(dls.train, Mine) and isinstance(dls.train, KeyedDL)
    assert equal(epochs(dls.train), epochs(loaders(block, 2).train))


def test_a_transform_among_the_tfms_of_datasets_needs_a_keyed_loader():
    "fastai does not show it the loader, so `dl_type` must"
    def make(w):
        set_seed(0)
        dsets = Datasets(range(n_items), [[photo, PILImage.create, AlbumentationsTransform(noise), ToTensor()], [parity]], splits=[range(32), range(32, 40)])
        return dsets.dataloaders(bs=8, num_workers=w, device='cpu', dl_type=KeyedDL).train
    assert equal(epochs(make(0)), epochs(make(2)))


images_of = {'colour': (ImageBlock, photo), 'grey': (ImageBlock(PILImageBW), grey_photo)}


@pytest.mark.parametrize('kind', images_of)
def test_grey_and_large_images_and_masks(kind):
    block, get_x = images_of[kind]
    large = A.Compose([A.Resize(300, 200), A.HorizontalFlip()])
    made = [loaders(image_block(AlbumentationsTransform(large, valid=large), block=block, get_x=get_x), w) for w in (0, 2)]
    x, = epochs(made[0].train, 1)
    assert x.shape[2:] == (300, 200) and equal([x], epochs(made[1].train, 1))


def mask_of(i): return PILMask.create(photos[i, ..., 0])


def test_segmentation():
    block = DataBlock(blocks=(ImageBlock, MaskBlock(codes=range(256))), get_x=photo, get_y=mask_of, splitter=IndexSplitter(range(8)),
                      item_tfms=[AlbumentationsTransform(A.Compose([A.HorizontalFlip(), A.VerticalFlip()])), Anybody()])
    def masks(w): return torch.cat([y for _, y in loaders(block, w).train])
    assert torch.equal(masks(0), masks(2))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter([float(i) for i in range(10)])


@pytest.mark.parametrize('num_workers', [0, 1])
def test_an_iterable_data_set(num_workers):
    ref = epochs(KeyedDL(Stream(), bs=4, seed=1, num_workers=0, after_item=FloatDraws()))
    got = epochs(KeyedDL(Stream(), bs=3, seed=1, num_workers=num_workers, after_item=FloatDraws()))
    assert equal(got, ref) and ref[0][:, 0].tolist() == list(range(10)) and len(torch.cat(ref)[:, 1].unique()) == 20
    assert KeyedDL(Stream(), bs=4, seed=1, num_workers=0, drop_last=True).one_batch().tolist() == [0, 1, 2, 3]


class Backwards(TfmdDL):
    "A loader with its own way through the epoch"
    def sample(self):
        own = [i for i in range(self.n) if i//self.bs % self.num_workers == self.offs]
        return iter([self.n - 1 - i for i in own])


def test_a_loader_with_its_own_sample():
    def make(w): return floats(keyed_class(Backwards), seed=1, num_workers=w)
    ref = epochs(make(0))
    assert ref[0][:, 0].tolist() == list(range(19, -1, -1)) and len(torch.cat(ref)[:, 1].unique()) == 40 and equal(epochs(make(2)), ref)


not_skipping = {'iterable': lambda: KeyedDL(Stream(), bs=4, seed=1, num_workers=0), 'own sample': lambda: floats(keyed_class(Backwards), seed=1),
                'a sample function': lambda: floats(seed=1, sample=lambda: iter([1, 2, 3]))}


@pytest.mark.parametrize('kind', not_skipping)
def test_these_cannot_go_on_in_the_middle(kind):
    dl = not_skipping[kind]()
    assert not dl.can_skip and floats(seed=1).can_skip
    next(iter(dl))  # from the beginning they can
    dl.begin = (1, 1)
    with pytest.raises(ValueError, match='iterable one.*save after whole epochs'): next(iter(dl))


@pytest.mark.parametrize('dl_type', [WeightedDL, PartialDL], ids=['WeightedDL', 'PartialDL'])
def test_loaders_that_sample(dl_type):
    "The order comes from `np.random` in the process that trains: by key too"
    kw = dict(wgts=[*range(20)]) if dl_type is WeightedDL else dict(partial_n=10)
    def make(w=0, seed=1): return floats(keyed_class(dl_type), shuffle=True, seed=seed, num_workers=w, **kw)
    ref = epochs(make())
    set_seed(7)
    assert equal(epochs(make(2)), ref) and not torch.equal(ref[0], ref[1]) and not equal(epochs(make(seed=2)), ref)
    assert len(ref[0]) == (20 if dl_type is WeightedDL else 10) and len(torch.cat(ref)[:, 1].unique()) == 2*len(ref[0])
    assert 0 not in ref[0][:, 0] or dl_type is PartialDL  # its weight is 0
    dl = make()
    dl.one_batch(), dl.one_batch()  # a look is a sample like the others, and changes nothing
    assert equal(epochs(dl), ref)


def test_a_batch_of_a_look_is_weighted_too():
    dl = floats(keyed_class(WeightedDL), shuffle=True, wgts=[0]*19 + [1])
    assert dl.one_batch()[:, 0].tolist() == [19]*4


def test_sorted_text_stays_sorted_and_is_shuffled_by_key():
    texts = [torch.arange(i) for i in np.random.default_rng(0).permutation(np.arange(1, 121))]
    def lengths(dl): return [[len(o) for o in b] for b in dl]
    def make(shuffle, cls=keyed_class(SortedDL), **kw): return cls([(o,) for o in texts], sort_func=lambda o: len(o[0]), shuffle=shuffle, bs=2, num_workers=0, create_batch=lambda b: [o[0] for o in b], **kw)
    assert lengths(make(False)) == [[i, i - 1] for i in range(120, 0, -2)]
    set_seed(1)
    a = make(True, seed=3)
    set_seed(2)
    b = make(True, seed=3)
    first = lengths(a)
    assert first == lengths(b) and first[0][0] == 120 and sorted(sum(first, [])) == list(range(1, 121))
    assert first != lengths(a)
    assert np.mean([abs(x - y) for x, y in first]) < 3  # a batch is of about one length


def test_a_language_model_loader():
    texts = [torch.arange(i*100, i*100 + 30) for i in range(10)]
    def make(): return keyed_class(LMDataLoader)([(o,) for o in texts], lens=[30]*10, bs=4, seq_len=10, shuffle=True, seed=3, num_workers=0)
    dl, other = make(), make()
    x, y = next(iter(dl))
    assert x.shape == (4, 10) and torch.equal(torch.Tensor(x[:, 1:]), torch.Tensor(y[:, :-1]))
    other.one_batch()
    other.epoch = 0
    first, second = ([x for x, _ in o] for o in (dl, other))  # its order is that of (seed, epoch), whatever came before
    assert equal(first, second) and len(first) == len(dl) == 8 and not equal(first, [x for x, _ in dl])
    assert type(dl.new(bs=2)) is type(dl) and dl.new(bs=2).one_batch()[0].shape == (2, 10)


def test_a_tabular_loader():
    df = pd.DataFrame(dict(a=list('abcd')*5, b=range(20), y=range(20)))
    to = TabularPandas(df, [Categorify], ['a'], ['b'], y_names='y', splits=([*range(16)], [*range(16, 20)]))
    rows = [torch.cat([b[1] for b in keyed_class(TabDataLoader)(to.train, bs=8, shuffle=True, seed=3)]).flatten() for _ in range(2)]
    assert torch.equal(*rows) and sorted(rows[0].tolist()) == list(range(16)) != rows[0].tolist()


def test_other_ways_to_number_items():
    "Batches that the data set makes, an order with lists or words in it, `n`, items that are left out"
    class Batches(list):
        def __getitem__(self, i): return torch.tensor([super(Batches, self).__getitem__(j) for j in i])
    dl = KeyedDL(Batches([1., 2., 3.]), bs=None, seed=1, num_workers=0, get_idxs=lambda: [[0, 1], [2, 0]])
    assert [b.tolist() for b in dl] == [[1, 2], [3, 1]]
    words = KeyedDL(dict(a=1., b=2.), bs=2, seed=1, num_workers=0, indexed=True, after_item=FloatDraws(), get_idxs=lambda: ['b', 'a', 'b'])
    assert torch.cat([*words])[:, 0].tolist() == [2, 1, 2] and len(torch.cat([*words])[:, 1].unique()) == 3
    assert len(torch.cat([*floats(n=20, seed=1, shuffle=True).new(n=7)])) == 7
    class Even(Transform):
        def encodes(self, x:float):
            if x % 2: raise SkipItemException
            return x
    assert torch.cat([*floats(after_item=Even(), seed=1)]).tolist() == list(range(0, 20, 2))


def test_order_flags_of_fastai():
    dl = floats(seed=1, after_item=None)
    assert torch.cat([*dl]).tolist() == list(range(20))
    assert torch.cat([*floats(seed=1, after_item=None, shuffle=True)]).tolist() != list(range(20))
    assert len(torch.cat([*floats(bs=6, seed=1, drop_last=True)])) == 18


def test_make_keyed_leaves_what_is_no_plain_loader():
    dl = floats(seed=4)
    epochs(dl, 1)
    make_keyed(dl)
    assert (dl.seed, dl.epoch) == (4, 0)
    for o in (None, [1], DataLoader([1]), torch.utils.data.DataLoader([1])):
        kind = type(o)
        make_keyed(o)
        assert type(o) is kind


# --- the global generators

def test_anybodys_draws_are_the_items():
    ref = epochs(floats(seed=1), 3)
    assert len(torch.cat(ref)[:, 1:].unique()) == 3*20*3
    for w in (1, 2): assert equal(epochs(floats(seed=1, num_workers=w, bs=7), 3), ref)


@pytest.mark.parametrize('num_workers', [0, 1, 2])
def test_an_epoch_goes_on_in_its_middle(num_workers):
    ref = epochs(floats(seed=1, shuffle=True), 3)
    dl = floats(seed=1, shuffle=True, num_workers=num_workers)
    dl.epoch, dl.begin = 0, (1, 2)  # two batches of the second epoch are over
    assert equal(epochs(dl), [ref[1][8:], ref[2]])


def test_the_generators_of_the_process_stay_as_they_are():
    dl = floats(seed=1)
    def between(around):
        set_seed(0)
        out = [three_draws()]
        for _ in around: out.append(three_draws())
        return out
    assert between(dl) == between(range(5))
    assert between([dl.do_batch([torch.ones(1)])]) == between(range(1))


def test_they_stay_as_they_are_after_an_error():
    class Bad(Transform):
        def encodes(self, x:float): raise RuntimeError(three_draws())
    set_seed(0)
    expected = three_draws()
    dl = floats(seed=1, after_item=Bad())
    set_seed(0)
    with pytest.raises(RuntimeError): list(dl)
    assert three_draws() == expected and dl.making is False


def test_a_training_is_the_same_with_any_number_of_workers():
    "With dropout, whose draws go on between the batches"
    def weights(w):
        dls = loaders(image_block([Anybody(), AlbumentationsTransform(noise)], IntToFloatTensor()), w, bs=4)
        set_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 2))
        learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), lr=1e-3)
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return [p.data for p in net.parameters()]
    ref = weights(0)
    for w in (1, 2): assert equal(weights(w), ref)


class Stop(Callback):
    "Ends a fit in the middle of its second epoch, where it is on"
    is_on = False
    def after_batch(self):
        if Stop.is_on and self.training and self.train_iter == 12: raise SystemError('broken off')


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_plain_datablock_goes_on_in_the_middle_of_an_epoch(num_workers, tmp_path, monkeypatch):
    "Its loaders are keyed, so `Checkpoint` can save after any batch: the same weights, whatever a new process draws"
    def fit(run_dir, seed):
        dls = loaders(image_block([Anybody(), AlbumentationsTransform(noise)], [BatchAugment.from_compose(flips[0]), IntToFloatTensor()]), num_workers, bs=4)
        set_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 2))
        learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), lr=1e-3, cbs=[Checkpoint(run_dir, every=3), Stop()])
        if seed: set_seed(seed)
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return [p.data for p in net.parameters()]
    whole = fit(tmp_path/'whole', 0)
    with monkeypatch.context() as m:
        m.setattr(Stop, 'is_on', True)
        with pytest.raises(SystemError): fit(tmp_path/'broken', 0)
    assert equal(fit(tmp_path/'broken', 7), whole)


def test_the_generators_of_an_item_differ_from_one_another():
    "Three of them are Mersenne twisters: with one seed they would draw the same numbers"
    with random_kept(devices=False):
        seed_global(key := item_seed(1, 2, 3))
        words = [random.getrandbits(32) for _ in range(50)], np.random.randint(0, 2**32, 50, dtype=np.uint64).tolist(), torch.randint(0, 2**32, (50,)).tolist()
    rng = KeyedRandom()
    under_key(lambda _: rng.rekey(), None, key)
    words += rng.np.integers(0, 2**32, 50).tolist(), [rng.py.getrandbits(32) for _ in range(50)]
    assert len(set(sum(map(list, words), []))) > 245


# --- several transforms

def flip_counts(x, mark):
    "How often the marked corner is in each of the four corners"
    return (x[:, 0].flatten(1) > mark).sum(0).tolist()


corner = np.zeros((2, 2, 3), np.uint8)
corner[0, 0] = 255
n_flips = 600


def corner_of(i): return corner
def quarters(counts): return sum(counts) == n_flips and max(abs(c - n_flips/4) for c in counts) < 4.5*(n_flips*3/16)**0.5


def corners(item_tfms=None, batch_tfms=None, **kwargs):
    set_seed(0)
    block = DataBlock(blocks=(ImageBlock, CategoryBlock(vocab=[0, 1])), get_x=corner_of, get_y=parity, splitter=IndexSplitter([0]),
                      item_tfms=item_tfms, batch_tfms=batch_tfms)
    return block.dataloaders(range(n_flips + 1), bs=150, num_workers=0, drop_last=False, device='cpu')


flips = [A.Compose([A.HorizontalFlip(p=0.5)]), A.Compose([A.VerticalFlip(p=0.5)])]


def test_two_item_transforms_flip_independently():
    dls = corners([AlbumentationsTransform(o) for o in flips])
    x, again = epochs(dls.train)
    assert quarters(flip_counts(x, 0.5)) and quarters(flip_counts(again, 0.5))
    moved = (x.flatten(1) != again.flatten(1)).any(1).sum()
    assert abs(moved - 0.75*n_flips) < 4.5*(n_flips*3/16)**0.5  # from one epoch to the next, too


def test_two_batch_transforms_flip_independently():
    dls = corners(batch_tfms=[BatchAugment.from_compose(o) for o in flips])
    x, again = epochs(dls.train)
    assert quarters(flip_counts(x, 0.5)) and quarters(flip_counts(again, 0.5))
    assert equal([x, again], epochs(corners(batch_tfms=[BatchAugment.from_compose(o) for o in flips]).train))
    assert not hasattr(x, 'keys')


def test_three_batch_transforms_have_a_row_of_keys_each():
    dls, seen = corners(batch_tfms=[BatchAugment([]) for _ in range(3)]), []
    for tfm in dls.train.after_batch.fs[:3]: tfm.draw = lambda keys, h, w: seen.append(keys) or []
    x, _ = next(iter(dls.train))
    assert [o.shape for o in seen] == [(150,)]*3 and len(np.unique(seen)) == 450 and not hasattr(x, 'keys')


def test_the_first_of_two_draws_what_it_draws_alone():
    one, two = (corners([AlbumentationsTransform(o) for o in flips[:n]]) for n in (1, 2))
    across = [epochs(o.train, 1)[0][:, 0].amax(1) for o in (one, two)]  # the columns, whatever the rows
    assert torch.equal(*across)


def test_alternating_flips_of_two_transforms_are_no_pair():
    x, again = epochs(corners([AlbumentationsTransform(A.Compose([o])) for o in (AlternatingFlip(), A.VerticalFlip(p=0.5))]).train)
    assert quarters(flip_counts(x, 0.5))
    twice = corners([AlbumentationsTransform(A.Compose([AlternatingFlip()])) for _ in range(2)])
    n = flip_counts(epochs(twice.train, 1)[0], 0.5)
    assert abs(n[1] - n_flips/2) < 4.5*(n_flips/4)**0.5  # by turns in both, all would be back where they were


@pytest.mark.parametrize('num_workers', [0, 2])
def test_two_transforms_on_the_short_cut_of_cifar(num_workers):
    tiny = synth_cifar(32, 10)
    def make():
        block = cifar_block(tiny, A.Compose([A.HorizontalFlip()]))
        block.item_tfms.append(AlbumentationsTransform(noise))
        return block.dataloaders(range(42), bs=8, seed=1, num_workers=num_workers, device='cpu').train
    short, long = make(), make()
    long.is_direct = lambda: False
    assert short.is_direct() and len([t for t in short.after_item.fs if isinstance(t, KeyedTransform)]) == 2
    assert equal(epochs(short), epochs(long))


def test_a_datablock_keeps_both_and_new_replaces_all():
    tfms = [AlbumentationsTransform(o) for o in flips]
    for block in (image_block(tfms), image_block().new(item_tfms=tfms)):
        assert [t for t in block.item_tfms if isinstance(t, AlbumentationsTransform)] == tfms
    assert [t for t in image_block(tfms).new(item_tfms=tfms[0]).item_tfms if isinstance(t, AlbumentationsTransform)] == tfms[:1]
    other = [Anybody(), Anybody()]  # as fastai has it
    assert [t for t in image_block(other).item_tfms if isinstance(t, Anybody)] == other[1:]


def test_streams_need_a_loader():
    "A key that is a plain number has one stream; without a key, each start is another"
    rng = KeyedRandom()
    def first(): rng.rekey(); return rng.np.random()
    token = item_key.set(item_seed(1, 2, 3))
    try: assert first() == first()
    finally: item_key.reset(token)
    assert first() != first()
    key = ItemKey(7)
    assert (key.next_stream(), key.n_streams) == (7, 1) and key.next_stream() not in (7, key.next_stream())


# --- keys of batches

class Spy(Transform):
    order = 1
    def __init__(self): self.keys = []
    def encodes(self, x:TensorImage): return self.keys.append(getattr(x, 'keys', None)) or x


def spied(tfms=(), **kwargs):
    spy = Spy()
    block = image_block(batch_tfms=[spy, *tfms, IntToFloatTensor()], **kwargs)
    return block, spy


@pytest.mark.parametrize('num_workers', [0, 2])
def test_batches_of_a_plain_datablock_have_keys(num_workers):
    block, spy = spied([BatchAugment([])])
    dls = loaders(block, num_workers)
    spy.keys.clear()  # fastai has looked at one item
    epochs(dls.train), epochs(dls.valid)
    keys = [k for k in spy.keys if k is not None]
    assert len(keys) == 2*4 and len(np.unique(np.concatenate(keys))) == 2*32 and len(spy.keys) == 2*4 + 2*1


def test_there_are_no_keys_where_nothing_needs_them():
    block, spy = spied(dl_type=KeyedDL)
    epochs(loaders(block).train)
    assert set(map(type, spy.keys)) == {type(None)}


def test_batches_that_are_not_an_image_an_item_have_keys():
    "Batches that the data set makes, and two images of one item"
    class Pairs:
        split_idx = 0
        def __len__(self): return 6
        def __getitem__(self, i): return TensorImage(torch.full((4, 3, 2, 2), i, dtype=torch.uint8))
    def make(w, **kw):
        spy = Spy()
        dl = KeyedDL(Pairs(), seed=1, num_workers=w, after_batch=[spy, BatchAugment([])], **kw)
        list(dl), list(dl)
        return spy.keys
    for kw in (dict(bs=None), dict(bs=2, create_batch=lambda b: torch.cat(b))):
        keys = make(0, **kw)
        np.testing.assert_array_equal(keys, make(2, **kw))
        assert len(np.unique(keys)) == 2*6*4


def test_a_batch_that_failed_leaves_no_items_to_the_next():
    tfms = [AlbumentationsTransform(A.Compose([]))]
    def make():
        block, spy = spied([BatchAugment([])], item_tfms=tfms)
        return loaders(block).train, spy
    (dl, spy), (ref, expected) = make(), make()
    for o in (dl, ref): o._make = o.create_item
    def fails(s):
        if len(dl.drawn) == 3: raise RuntimeError('stop')
        return dl._make(s)
    dl.create_item = fails
    with pytest.raises(RuntimeError): list(dl)
    del dl.create_item
    ref.epoch = 0
    spy.keys.clear(), expected.keys.clear()
    list(dl), list(ref)
    np.testing.assert_array_equal(spy.keys, expected.keys)


def test_a_transform_in_the_pipeline_of_a_data_set_is_named():
    "It gets no key there, so that 0 and 2 workers would differ without a word"
    tfm = AlbumentationsTransform(A.Compose([A.HorizontalFlip()]))
    with pytest.warns(UserWarning, match='AlbumentationsTransform in the pipeline of a data set .*: put it among the item_tfms'):
        Datasets(range(4), [[lambda i: PILImage.create(np.zeros((8, 8, 3), np.uint8)), tfm]])
