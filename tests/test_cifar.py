"The checks of the modules of `cifar`: every layout gives the same arrays, the cache survives, and nothing bad is let in"
import importlib.util
import os
import pickle
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fastai.data.external import fastai_cfg
from PIL import Image
from processes import Script

import s9_fastai.cifar.cache as caching
import s9_fastai.data.cache as data_cache
import s9_fastai.cifar.download as downloading
import s9_fastai.cifar.layouts as layouts
from s9_fastai.cifar.archives import archive_files
from s9_fastai.cifar.cache import open_cache, source_key
from s9_fastai.cifar.load import SAMPLE, find_source, load_cifar
from s9_fastai.cifar.facts import BATCHES, CLASSES, SPLITS
from s9_fastai.cifar.layouts import read_source
from s9_fastai.cifar.pickles import ArrayUnpickler
from s9_fastai.cifar.png import decode_png

root = Path(__file__).resolve().parent.parent
needs_data = pytest.mark.skipif(not os.environ.get('S9_CIFAR10'), reason='S9_CIFAR10 does not name the full CIFAR-10')


# Tiny sets, the same images in every layout

def tiny_arrays(n=25, seed=0):
    "Training and test images (n, 32, 32, 3) and labels (n,), no two neighbours of one class"
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n)*3 % 10) for _ in SPLITS]


def png(px):
    "Pixels as the content of a PNG file"
    f = BytesIO()
    Image.fromarray(px).save(f, 'png')
    return f.getvalue()


def write_fastai(folder, arrays):
    "fastai's layout, with labels.txt and the hidden files that some systems leave"
    for s, (x, y) in zip(SPLITS, arrays):
        for i, (px, c) in enumerate(zip(x, y)):
            d = folder/s/CLASSES[c]
            d.mkdir(parents=True, exist_ok=True)
            (d/f'{i}_{CLASSES[c]}.png').write_bytes(png(px))
            (d/f'._{i}_{CLASSES[c]}.png').write_bytes(b'not an image')
        (folder/s/'.DS_Store').write_bytes(b'')
    (folder/'labels.txt').write_text('\n'.join(CLASSES))
    return folder


class Py2Pickler(pickle._Pickler):
    "Writes bytes and text as Python 2 wrote its strings"
    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, o):
        b = o if isinstance(o, bytes) else o.encode('latin1')
        self.write(pickle.BINSTRING + len(b).to_bytes(4, 'little') + b)
        self.memoize(o)
    dispatch[bytes] = dispatch[str] = save_string


def py2_dumps(o):
    "A pickle as Python 2 with numpy 1 would have written it"
    f = BytesIO()
    Py2Pickler(f, protocol=2).dump(o)
    return f.getvalue().replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')


def batch_dict(x, y):
    "A batch as torchvision has it: rows of all red, all green, all blue values"
    rows = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(-1, 3072)
    return {'batch_label': 'tiny', 'labels': y.tolist(), 'data': rows, 'filenames': ['x.png']*len(y)}


def write_batches(folder, arrays, dumps=py2_dumps):
    "torchvision's layout: five training batches of unequal length and a test batch"
    folder.mkdir(parents=True)
    (x, y), test = arrays
    parts = [(x[i], y[i]) for i in np.array_split(np.arange(len(y)), 5)] + [test]
    for name, (x, y) in zip(BATCHES, parts): (folder/name).write_bytes(dumps(batch_dict(x, y)))
    (folder/'batches.meta').write_bytes(dumps({'label_names': list(CLASSES)}))
    return folder


def tar_of(folder, dst, mode='w:gz', reverse=False):
    "Pack `folder`, its members in the order of their names or the other way round"
    with tarfile.open(dst, mode) as tf:
        for p in sorted([folder, *folder.rglob('*')], reverse=reverse):
            tf.add(p, str(p.relative_to(folder.parent)), recursive=False)
    return dst


@pytest.fixture
def arrays(): return tiny_arrays()


@pytest.fixture
def tiny(tmp_path, arrays): return write_fastai(tmp_path/'data'/'cifar10', arrays)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A fastai home of its own, and no S9_CIFAR10"
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.delenv('S9_CIFAR10', raising=False)
    fastai_cfg.cache_clear()
    yield tmp_path/'home'
    fastai_cfg.cache_clear()


def assert_same(splits, arrays):
    for (x, y), (rx, ry) in zip(splits, arrays):
        assert x.dtype == np.uint8 and y.dtype == np.int64
        np.testing.assert_array_equal(x, rx)
        np.testing.assert_array_equal(y, ry)


# Layouts

def test_every_layout_gives_the_same_arrays_in_the_same_order(tmp_path, tiny, arrays):
    bs = write_batches(tmp_path/'tv'/'cifar-10-batches-py', arrays)
    sources = [tiny, tiny.parent, bs, bs.parent, tar_of(tiny, tmp_path/'cifar10.tgz'),
               tar_of(tiny, tmp_path/'back.tar.gz', reverse=True), tar_of(tiny, tmp_path/'cifar10.tar', 'w'),
               tar_of(bs, tmp_path/'cifar-10-python.tar.gz')]
    keys = set()
    for src in sources:
        ds = load_cifar(src, tmp_path/'cache')
        assert_same(ds[:2], arrays)
        assert ds.source == str(src)
        keys.add(ds.key)
    assert len(keys) == 1


def test_archive_without_a_top_folder(tmp_path, tiny, arrays):
    with tarfile.open(tmp_path/'flat.tgz', 'w:gz') as tf: tf.add(tiny, '.')
    assert_same(read_source(tmp_path/'flat.tgz'), arrays)


def test_folder_equals_a_plain_loop_over_its_files(tiny):
    for s, (x, y) in zip(SPLITS, read_source(tiny)):
        ps = sorted((p for p in (tiny/s).glob('*/[0-9]*.png')), key=lambda p: int(p.name.split('_')[0]))
        np.testing.assert_array_equal(x, np.stack([np.array(Image.open(p)) for p in ps]))
        assert [CLASSES[i] for i in y] == [p.parent.name for p in ps]


def test_names_without_a_number_come_last(tiny):
    for n in ('b.png', 'a.png'): (tiny/'test'/'cat'/n).write_bytes(png(np.full((32, 32, 3), ord(n[0]), np.uint8)))
    assert read_source(tiny)[1].images[-2:, 0, 0, 0].tolist() == [ord('a'), ord('b')]


def test_two_layouts_below_one_folder_are_ambiguous(tmp_path, tiny, arrays):
    write_batches(tiny.parent/'cifar-10-batches-py', arrays)
    msg = 'CIFAR-10 is in cifar-10-batches-py, cifar10; give one of these'
    with pytest.raises(ValueError, match=msg): read_source(tiny.parent)


@pytest.mark.parametrize('make, msg', [
    (lambda d: (d/'train'/'lynx').mkdir(), "train/lynx: 'lynx' is not a class, allowed are airplane, automobile, bird"),
    (lambda d: (d/'test'/'notes.txt').write_text(''), "'notes.txt' is not a class"),
    (lambda d: (d/'test'/'cat'/'more').mkdir(), 'test/cat/more: out of place'),
    (lambda d: [p.unlink() for p in (d/'train'/'dog').iterdir()], 'train: no image of dog; every class'),
    (lambda d: (d/'test').rename(d/'valid'), 'test: no images; train and test must both be there'),
    (lambda d: [(d/s).rename(d/f'my{s}') for s in SPLITS], 'no CIFAR-10 in this folder')])
def test_a_folder_that_is_not_as_it_should_be(tiny, make, msg):
    make(tiny)
    with pytest.raises(ValueError, match=msg) as e: read_source(tiny)
    assert str(e.value).startswith(str(tiny))
    if 'folder' not in msg:  # an archive of it says the same
        with pytest.raises(ValueError, match=msg): read_source(tar_of(tiny, tiny.parent/'a.tgz'))


# Images

deep = BytesIO()
Image.fromarray(np.zeros((32, 32), np.uint16)).save(deep, 'png')
good = png(np.zeros((32, 32, 3), np.uint8))


def deep_rgb():
    "16 bits a channel, which PIL would cut to 8 in silence"
    import struct
    import zlib
    def chunk(t, d): return struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))
    rows = b''.join(b'\0' + bytes(32*6) for _ in range(32))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 32, 32, 16, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


@pytest.mark.parametrize('data, msg', [
    (png(np.zeros((32, 33, 3), np.uint8)), '33x32 pixels, only 32x32 is allowed; resize it'),
    (png(np.zeros((32, 32), np.uint8)), r"mode L, 8 bits, only 8-bit RGB is allowed; save im.convert\('RGB'\)"),
    (png(np.zeros((32, 32, 4), np.uint8)), 'mode RGBA'),
    (deep.getvalue(), 'mode I;16, 16 bits'), (deep_rgb(), 'mode RGB, 16 bits'),
    (b'I am no picture', 'not a PNG file'), (b'', 'not a PNG file'), (good[:-20], 'damaged or cut short'),
    (good[:-16] + bytes([good[-16] ^ 1]) + good[-15:], 'damaged or cut short'), (good[:50], '.'),
    (b'\x89PNG\r\n\x1a\n', '.')])
def test_bad_images_are_refused_by_name(tiny, data, msg):
    (tiny/'train'/'cat'/'1_cat.png').write_bytes(data)
    with pytest.raises(ValueError, match=f'train/cat/1_cat.png: {msg}') as e: read_source(tiny)
    assert '\n' not in str(e.value)


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    huge = good[:16] + (20_000).to_bytes(4, 'big')*2 + good[24:]  # its checksum no longer fits, too
    datas = png(np.zeros((4000, 4000, 3), np.uint8)), huge
    def load(self): raise AssertionError('pixels were decoded')
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', load)
    for data in datas:
        with pytest.raises(ValueError, match='^a.png: '): decode_png(data, 'a.png')
    with pytest.raises(AssertionError): decode_png(good)


def test_a_file_too_large_is_not_read(tiny):
    (tiny/'train'/'cat'/'1_cat.png').write_bytes(bytes(70_000))
    for src in (tiny, tar_of(tiny, tiny.parent/'a.tgz')):
        with pytest.raises(ValueError, match='train/cat/1_cat.png: 70000 bytes, allowed are at most'): read_source(src)


def test_damaged_images_are_errors_never_other_pixels():
    rng, px = np.random.default_rng(0), tiny_arrays()[0][0][0]
    data, n = png(px), 0
    for _ in range(3000):
        bad = bytearray(data[:rng.integers(1, len(data))] if rng.random() < .1 else data)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        try: np.testing.assert_array_equal(decode_png(bytes(bad), 'a.png'), px)
        except ValueError as e: n += str(e).startswith('a.png: ')
    assert n > 2900


# Archives

@pytest.mark.parametrize('name, kw', [
    ('../evil.png', {}), ('cifar10/../../evil.png', {}), ('/etc/evil.png', {}), ('.hidden/../../evil.png', {}),
    ('cifar10/train/cat/1_cat.png', dict(type=tarfile.SYMTYPE, linkname='/etc/passwd')),
    ('cifar10/train/cat/1_cat.png', dict(type=tarfile.SYMTYPE, linkname='2_cat.png')),
    ('cifar10/train/cat/1_cat.png', dict(type=tarfile.LNKTYPE, linkname='../../secret')),
    ('cifar10/train/cat/1_cat.png', dict(type=tarfile.CHRTYPE)), ('cifar10/pipe', dict(type=tarfile.FIFOTYPE))])
def test_unsafe_members_are_refused_by_name(tmp_path, tiny, name, kw):
    m = tarfile.TarInfo(name)
    for k, v in kw.items(): setattr(m, k, v)
    with tarfile.open(tmp_path/'evil.tar', 'w') as tf:
        tf.add(tiny, 'cifar10')
        tf.addfile(m)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ValueError, match='evil.tar: member .* is refused') as e: archive_files(tmp_path/'evil.tar')
    assert repr(name) in str(e.value)
    assert sorted(tmp_path.rglob('*')) == before


def test_damaged_archives(tmp_path, tiny):
    tgz, bad = tar_of(tiny, tmp_path/'a.tgz'), tmp_path/'bad.tgz'
    xz, data = tar_of(tiny, tmp_path/'a.txz', 'w:xz').read_bytes(), tgz.read_bytes()
    flip = data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]  # gzip's own checksum, at the end
    holes = data[:5000] + bytes(100) + data[5100:], xz[:900] + xz[999:]
    for content in (data[:-2000], data[:100], flip, b'', b'text', *holes):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match='bad.tgz: ') as e: read_source(bad)
        assert '\n' not in str(e.value)


def test_other_archives_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr('train/cat/1_cat.png', good)
    with pytest.raises(ValueError, match='a.zip: not a tar archive'): read_source(tmp_path/'a.zip')
    (tmp_path/'other').mkdir()
    other = tar_of(tmp_path/'other', tmp_path/'o.tgz')
    with pytest.raises(ValueError, match='no CIFAR-10 in this archive'): read_source(other)


def test_a_python_without_the_filter_says_so(monkeypatch):
    monkeypatch.delattr(tarfile, 'data_filter')
    with pytest.raises(ValueError, match='use Python 3.10.12, 3.11.4 or newer, or give'): archive_files(SAMPLE)


# Pickles

def bytes_keys(d): return {k.encode(): v for k, v in d.items()}


@pytest.mark.parametrize('dumps', [
    py2_dumps, lambda o: py2_dumps(bytes_keys(o)), lambda o: pickle.dumps(bytes_keys(o)),
    *(lambda o, p=p: pickle.dumps(o, protocol=p) for p in range(6))])
def test_every_way_to_write_a_batch(tmp_path, arrays, dumps):
    assert_same(read_source(write_batches(tmp_path/'b', arrays, dumps)), arrays)


def test_the_python_2_pickles_of_these_tests_are_such(arrays):
    data = py2_dumps(batch_dict(*arrays[1]))
    assert b'cnumpy.core.multiarray\n_reconstruct' in data and b'_codecs' not in data
    d = pickle.loads(data, encoding='bytes')  # as the CIFAR-10 page reads the real ones
    assert set(d) == {b'batch_label', b'labels', b'data', b'filenames'} and d[b'data'].shape == (25, 3072)


class Call:
    "Pickles to a call of `f` with `args`"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


def evil_pickles(mark):
    "Pickles that would make the file `mark`, or reach for what could, each with the name that must be refused"
    m = str(mark)
    calls = (os.system, f'touch {m}'), (eval, f'open("{m}", "w")'), (open, m, 'w'), (np.memmap, m, 'u1', 'w+', 0, 9)
    for f, *args in calls:
        for p in range(6): yield pickle.dumps({'data': Call(f, *args), 'labels': []}, p), f.__name__
    yield b'cbuiltins\ngetattr\n(cos\nsystem\ntR.', 'builtins.getattr'
    yield b'\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.', 'numpy.ndarray.tofile'
    yield b'c_codecs\nencode\n(X\x01\0\0\0aX\x03\0\0\0hextR.', "_codecs.encode with 'hex'"


def test_pickles_that_would_run_code_do_not(tmp_path, arrays):
    mark, bs = tmp_path/'ran', write_batches(tmp_path/'b', arrays)
    for data, name in evil_pickles(mark):
        with pytest.raises(pickle.UnpicklingError) as e: ArrayUnpickler(BytesIO(data), encoding='latin1').load()
        assert name in str(e.value)
        (bs/'data_batch_3').write_bytes(data)
        with pytest.raises(ValueError, match='data_batch_3: not a CIFAR-10 batch .UnpicklingErr') as e: read_source(bs)
        assert name in str(e.value) and not mark.exists()


def test_such_a_pickle_does_run_code_elsewhere(tmp_path):
    data, name = next(evil_pickles(tmp_path/'ran'))
    assert name == 'system' and not (tmp_path/'ran').exists()
    pickle.loads(data)
    assert (tmp_path/'ran').exists()


@pytest.mark.parametrize('change, msg', [
    (lambda d: d.pop('data'), 'KeyError'), (lambda d: d.pop('labels'), 'KeyError'),
    (lambda d: d.update(data=d['data'].astype(float)), r'data is float64 \(25, 3072\), it must be a uint8 array'),
    (lambda d: d.update(data=d['data'][:, 1:]), r'data is uint8 \(25, 3071\)'),
    (lambda d: d.update(data=[1]), 'data is list'),
    (lambda d: d['labels'].pop(), 'labels must be a list of 25 whole numbers from 0 to 9'),
    (lambda d: d.update(labels=[10]*25), 'labels must be'), (lambda d: d.update(labels=[-1]*25), 'labels must be'),
    (lambda d: d.update(labels=[1.]*25), 'labels must be'), (lambda d: d.update(labels=None), 'labels must be')])
def test_batches_that_are_not_as_they_should_be(tmp_path, arrays, change, msg):
    bs, d = write_batches(tmp_path/'b', arrays), batch_dict(*arrays[1])
    change(d)
    (bs/'test_batch').write_bytes(pickle.dumps(d))
    with pytest.raises(ValueError, match=f'test_batch: .*{msg}'): read_source(bs)


def test_damaged_and_missing_batches(tmp_path, arrays):
    bs = write_batches(tmp_path/'b', arrays)
    data = (bs/'test_batch').read_bytes()
    for bad in (b'', b'text', data[:-100], data[5:], pickle.dumps([1])):
        (bs/'test_batch').write_bytes(bad)
        with pytest.raises(ValueError, match='test_batch: not a CIFAR-10 batch'): read_source(bs)
    (bs/'data_batch_4').unlink()
    with pytest.raises(ValueError, match='data_batch_4 not found; all of data_batch_1'): read_source(bs)


# The cache

def no_read(*a, **k): raise AssertionError('the images were decoded again')


def test_second_load_maps_the_first_ones_arrays(tmp_path, tiny, arrays, monkeypatch):
    load_cifar(tiny, tmp_path/'c')
    monkeypatch.setattr(caching, 'read_source', no_read)
    ds = load_cifar(tiny, tmp_path/'c')
    assert_same(ds[:2], arrays)
    assert all(isinstance(a, np.memmap) and not a.flags.writeable for s in ds[:2] for a in s)
    assert [p.name for p in (tmp_path/'c').iterdir()] == [source_key(tiny)]


def test_changed_content_is_noticed(tmp_path, tiny):
    tgz = tar_of(tiny, tmp_path/'a.tgz')
    for i, src in enumerate((tiny, tgz)):
        old = load_cifar(src, tmp_path/'c')
        (tiny/'train'/'airplane'/'0_airplane.png').write_bytes(png(np.full((32, 32, 3), i, np.uint8)))
        tar_of(tiny, tgz)
        new = load_cifar(src, tmp_path/'c')
        assert new.key != old.key and new.train.images[0].max() == i and old.train.images[0].max() != i


def damage_flip(d):
    p = d/'train_images.npy'
    data = bytearray(p.read_bytes())
    data[-5] ^= 1
    p.write_bytes(data)


@pytest.mark.parametrize('damage', [
    damage_flip, lambda d: (d/'test_labels.npy').unlink(), lambda d: (d/'test_images.npy').write_bytes(b''),
    lambda d: (d/'train_images.npy').write_bytes((d/'train_images.npy').read_bytes()[:-1]),
    lambda d: (d/'meta.json').unlink(), lambda d: (d/'meta.json').write_text('{'),
    lambda d: (d/'meta.json').write_text('[]'), lambda d: (d/'meta.json').write_text('{}'),
    lambda d: np.save(d/'test_labels.npy', np.zeros(25, np.int64)),
    lambda d: np.save(d/'test_labels.npy', np.array([{}]*25, object), allow_pickle=True),
    lambda d: (d/'test_labels.npy').write_bytes(b'PK\3\4'), lambda d: [p.unlink() for p in d.iterdir()]])
def test_a_damaged_entry_is_made_again_with_a_warning(tmp_path, tiny, arrays, damage, recwarn):
    load_cifar(tiny, tmp_path/'c')
    damage(tmp_path/'c'/source_key(tiny))
    with pytest.warns(UserWarning, match='the cache is damaged .* made again'): ds = load_cifar(tiny, tmp_path/'c')
    assert_same(ds[:2], arrays)
    recwarn.clear()
    load_cifar(tiny, tmp_path/'c')
    assert not recwarn.list


def test_random_damage_is_never_taken_for_an_entry(tmp_path, tiny):
    load_cifar(tiny, tmp_path/'c')
    d, rng = tmp_path/'c'/source_key(tiny), np.random.default_rng(0)
    for i in range(200):
        p = d/('test_labels.npy', 'meta.json')[i % 2]
        data = p.read_bytes()
        bad = bytearray(data[:rng.integers(len(data))] if rng.random() < .3 else data)
        if len(bad): bad[rng.integers(min(128, len(bad)))] ^= 1 << rng.integers(8)
        p.write_bytes(bad)
        try: assert_same(open_cache(d, 'x')[:2], tiny_arrays())  # a change of spacing does no harm
        except ValueError as e: assert str(e).startswith(f'{d}: the cache is damaged')
        p.write_bytes(data)


def test_an_entry_is_whole_or_not_there(tmp_path, tiny, monkeypatch):
    def die(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', die)
        with pytest.raises(KeyboardInterrupt): load_cifar(tiny, tmp_path/'c')
    assert not list((tmp_path/'c').iterdir())


def test_a_cache_that_cannot_be_written_says_so_before_decoding(tmp_path, tiny, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setattr(caching, 'read_source', no_read)
    with pytest.raises(OSError, match='file/c: the cache cannot be written there .* cache_dir, or .* FASTAI_HOME'):
        load_cifar(tiny, tmp_path/'file'/'c')
    def denied(**k): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(data_cache, 'TemporaryDirectory', denied)  # a folder that is there and read-only
    with pytest.raises(OSError, match='c: the cache cannot be written there .*Permission denied'):
        load_cifar(tiny, tmp_path/'c')


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path, tiny, monkeypatch):
    def denied(*a): raise PermissionError(13, 'Permission denied', 'train/cat/1_cat.png')
    monkeypatch.setattr(layouts, 'file_bytes', denied)
    with pytest.raises(PermissionError) as e: load_cifar(tiny, tmp_path/'c')
    assert 'cache' not in str(e.value)


def test_two_processes_at_once_both_end_well(tmp_path, tiny, arrays):
    code = ('import sys, time, s9_fastai.cifar.cache as c, s9_fastai.cifar.load as load; from pathlib import Path\n'
            'real = c.read_source\n'
            'def slow(*a):\n'
            '    Path(sys.argv[3]).touch(); out = real(*a)\n'  # both decode before either one publishes
            '    while not all(Path(p).exists() for p in sys.argv[3:]): time.sleep(.01)\n'
            '    return out\n'
            'c.read_source = slow\n'
            'print(load.load_cifar(*sys.argv[1:3]).key)')
    (tmp_path/'load.py').write_text(code)
    marks = [str(tmp_path/'m0'), str(tmp_path/'m1')]
    done = [p.end() for p in [Script(tmp_path/'load.py', tiny, tmp_path/'c', *m) for m in (marks, marks[::-1])]]
    keys = [o.stdout for o in done]
    assert [o.returncode for o in done] == [0, 0] and keys[0] == keys[1] != ''
    assert [p.name for p in (tmp_path/'c').iterdir()] == [source_key(tiny)]
    assert load_cifar(tiny, tmp_path/'c').key == keys[0].strip()


# Finding

def no_network(*a, **k): raise OSError('Network is unreachable')


def test_search_order(tmp_path, tiny, home, monkeypatch):
    got = []
    monkeypatch.setattr(downloading, 'fetch', lambda url, dest, progress: got.append(url) or tar_of(tiny, dest))
    monkeypatch.setattr(downloading, 'read_checks', lambda module: {})
    arch, data = home/'archive'/'cifar10.tgz', home/'data'/'cifar10'
    for _ in range(2): assert find_source() == arch and got == [downloading.URLs.CIFAR]
    data.mkdir(parents=True)
    assert find_source() == data
    monkeypatch.setenv('S9_CIFAR10', str(tiny))
    assert find_source() == tiny
    assert find_source(arch) == arch and find_source('sample') == SAMPLE
    monkeypatch.setenv('S9_CIFAR10', '')
    assert find_source() == data
    assert len(got) == 1


def test_default_cache_is_in_fastais_folder(tiny, home):
    load_cifar(tiny)
    assert (home/'data'/'s9_fastai'/source_key(tiny)/'meta.json').exists()


def test_nothing_there_and_no_network(home, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(downloading, 'fetch', lambda url, *a: calls.append(url) or no_network())
    with pytest.raises(FileNotFoundError) as e: load_cifar()
    for o in ('S9_CIFAR10', str(home/'data'/'cifar10'), str(home/'archive'/'cifar10.tgz'), downloading.URLs.CIFAR,
              'Network is unreachable', "or give 'sample' for the embedded sample"): assert o in str(e.value)
    assert '\n' not in str(e.value) and isinstance(e.value.__cause__, OSError) and len(calls) == 1
    assert capsys.readouterr() == ('', '')


def test_a_download_is_quiet_in_a_pipe(home, monkeypatch, capsys):
    monkeypatch.setattr(downloading, 'urlopen', no_network)
    with pytest.raises(FileNotFoundError, match='Network is unreachable'): load_cifar()
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('by_env', [False, True])
def test_a_path_that_is_wrong_is_not_passed_over(home, monkeypatch, by_env):
    if by_env: monkeypatch.setenv('S9_CIFAR10', 'nowhere')
    who = 'S9_CIFAR10: ' if by_env else ''
    with pytest.raises(FileNotFoundError, match=f'^{who}nowhere: no such file or folder; give'):
        load_cifar(None if by_env else 'nowhere')


def test_an_unwritable_home_names_the_remedy(tmp_path, tiny, home, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'file'))
    with pytest.raises(OSError, match='set FASTAI_HOME to a folder'): load_cifar()
    assert len(load_cifar('sample').test.labels) == 500  # needs no place to write
    assert len(load_cifar(tiny, tmp_path/'c').test.labels) == 25


# The sample and the full set

def make_sample():
    "The module tools/make_sample.py"
    spec = importlib.util.spec_from_file_location('make_sample', root/'tools'/'make_sample.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod


def test_the_sample_is_small_balanced_and_the_start_of_each_class():
    ds = load_cifar('sample')
    assert SAMPLE.stat().st_size < 7_000_000 and ds.source == 'sample'
    assert ds.train.images.shape == (2000, 32, 32, 3) and ds.test.images.shape == (500, 32, 32, 3)
    assert np.bincount(ds.train.labels).tolist() == [200]*10 and np.bincount(ds.test.labels).tolist() == [50]*10
    assert not any(a.flags.writeable for s in ds[:2] for a in s)
    # the first ten labels of the two sets, well known from every tutorial
    assert ds.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert ds.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]


def test_make_sample_refuses_too_few_images(tiny):
    msg = 'train/airplane: 3 images, at least 200 are needed'
    with pytest.raises(ValueError, match=msg): make_sample().sample_bytes(tiny)


@needs_data
def test_the_full_set():
    ds = load_cifar()
    assert np.bincount(ds.train.labels).tolist() == [5000]*10 and np.bincount(ds.test.labels).tolist() == [1000]*10
    for full, part, n in zip(ds[:2], load_cifar('sample')[:2], (200, 50)):
        first = np.sort(np.concatenate([np.flatnonzero(full.labels == c)[:n] for c in range(10)]))
        np.testing.assert_array_equal(full.images[first], part.images)
        np.testing.assert_array_equal(full.labels[first], part.labels)


@needs_data
def test_the_sample_is_what_the_rule_gives_byte_for_byte():
    assert make_sample().sample_bytes(find_source()) == SAMPLE.read_bytes()
