"The faults of data, as a user meets them: one line that says what is wrong and what to do, and nothing lost"
import gzip
import hashlib
import http.server
import os
import pickle
import re
import shutil
import socket
import sys
import tarfile
import threading
import tracemalloc
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from fastdownload.core import path_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import Script, run
from test_cifar import assert_same, deep, deep_rgb, evil_pickles, home, png, tar_of, tiny_arrays, write_batches, write_fastai

import s9_fastai.cifar.cache as caching
import s9_fastai.data.cache as data_cache
import s9_fastai.cifar.download as downloading
import s9_fastai.cifar.layouts as layouts
from s9_fastai.cifar.archives import archive_files
from s9_fastai.cifar.cache import source_key
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.facts import BATCHES
from s9_fastai.core.text import shown
from s9_fastai.cifar.png import decode_png
from s9_fastai.cifar.readers import array_data
from s9_fastai.data.readers import PixelReader
from s9_fastai.app.train import main_train

posix = pytest.mark.skipif(os.name == 'nt', reason='Windows has no pipes in the file system, and needs a right for links')
nothing = 'no message: '  # for the faults that do no harm
odd_names = {'spaces': 'a b', 'quotes': '\'"`', 'a newline': 'a\nb', 'bytes that are no text': os.fsdecode(b'a\xff\xfeb')}


def pixels(*shape, dtype=np.uint8): return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def snapshot(folder):
    "Everything below `folder`: its kind, and a file's content"
    def what(p):
        if os.path.islink(p): return os.readlink(p)
        return hashlib.md5(open(p, 'rb').read()).hexdigest() if os.path.isfile(p) else os.path.isdir(p)
    return {p: what(p) for d, _, files in os.walk(folder) for p in [d, *(os.path.join(d, f) for f in files)]}


@pytest.fixture
def tiny(tmp_path): return write_fastai(tmp_path/'data'/'cifar10', tiny_arrays(10))


@pytest.fixture
def cache(tmp_path):
    "A cache with the entry of another set"
    load_cifar(write_fastai(tmp_path/'other', tiny_arrays(10, seed=1)), tmp_path/'cache')
    return tmp_path/'cache'


@pytest.fixture
def refusal(tmp_path, cache):
    "A function of a path: the one line with which `load_cifar` refuses it, when everything is as it was before"
    def get(path, cache=cache):
        before = snapshot(tmp_path)
        with warnings.catch_warnings(), pytest.raises((ValueError, OSError)) as e:
            warnings.simplefilter('error')  # they would be more lines for the user
            load_cifar(path, cache)
        assert type(e.value) in (ValueError, OSError, FileNotFoundError, PermissionError)
        assert str(e.value).isprintable() and snapshot(tmp_path) == before
        return str(e.value)
    return get


def make_odd(f, *args):
    "`f(*args)`; some file systems take text only"
    try: return f(*args)
    except OSError as e: pytest.skip(f'this file system has no such names: {e}')


# Images

def as_png(im, **kw):
    f = BytesIO()
    im.save(f, 'png', **kw)
    return f.getvalue()


def animation(): return as_png(Image.new('RGB', (32, 32)), save_all=True, append_images=[Image.new('RGB', (32, 32), c) for c in ('red', 'blue')])
def bomb(): return as_png(Image.new('1', (10_000, 10_000)))  # 12 kB, no larger than a file may be


good = png(pixels(32, 32, 3))
bad_images = {
    'a truncated image': (lambda: good[:-900], 'damaged or cut short; get the file again'),
    'an image of zero bytes': (lambda: b'', 'not a PNG file, it has 0 bytes; replace or remove the file'),
    'a text file named .png': (lambda: b'I am text\n', "not a PNG file, it has 10 bytes, which begin with b'I am tex'; replace"),
    'a grey image': (lambda: png(pixels(32, 32)), "mode L, 8 bits, only 8-bit RGB is allowed; save im.convert('RGB')"),
    'an image with alpha': (lambda: png(pixels(32, 32, 4)), 'mode RGBA, 8 bits, only 8-bit RGB'),
    'an image with a transparent colour': (lambda: as_png(Image.new('RGB', (32, 32)), transparency=(0, 0, 0)), 'a transparent colour'),
    'a grey image of 16 bits': (deep.getvalue, 'mode I;16, 16 bits, only 8-bit RGB is allowed; divide its values by 257'),
    'a colour image of 16 bits': (deep_rgb, 'mode RGB, 16 bits, only 8-bit RGB is allowed; divide its values by 257'),
    'an animated image': (animation, "an animation, only a still image is allowed; save im.convert('RGB')"),
    'an image of 31x32': (lambda: png(pixels(32, 31, 3)), '31x32 pixels, only 32x32 is allowed; resize it'),
    'an image of 10,000x10,000': (bomb, '10000x10000 pixels, only 32x32 is allowed; resize it'),
    'an image file larger than any': (lambda: bytes(70_000), '70000 bytes, allowed are at most 65536; remove or replace'),
}


@pytest.mark.parametrize('what', bad_images)
def test_images(tiny, refusal, fault, monkeypatch, what):
    data, msg = bad_images[what]
    (tiny/'train'/'cat'/'1_cat.png').write_bytes(data())
    real = Image.open
    monkeypatch.setattr('PIL.Image.open', lambda f, **kw: pytest.fail('PIL saw it') if len(f.getvalue()) > 9000 else real(f, **kw))
    message = refusal(tiny)
    assert f'{tiny}: train/cat/1_cat.png: {msg}' in message
    tgz = tar_of(tiny, tiny.parent/'a.tgz')
    assert refusal(tgz).endswith(message.removeprefix(f'{tiny}: ')) and str(tgz) in refusal(tgz)
    fault('images', what, message)


def replace_by(path, make):
    "Put what `make` makes in the place of the file or folder `path`"
    if path.is_dir(): shutil.rmtree(path)
    else: path.unlink()
    make(path)


bad_folders = {
    'an unknown class folder': (lambda d: (d/'train'/'lynx').mkdir(), "train/lynx: 'lynx' is not a class, allowed are airplane"),
    'a class with no image': (lambda d: [p.unlink() for p in (d/'train'/'dog').iterdir()], 'train: no image of dog; every class'),
    'an empty folder': (lambda d: replace_by(d, Path.mkdir), 'no CIFAR-10 in this folder; it must hold train/ and test/'),
    'a folder without test': (lambda d: (d/'test').rename(d.parent/'test2'), 'test: no images; train and test must both be there'),
    'a file in the place of test': (lambda d: replace_by(d/'test', Path.touch), 'test: out of place, allowed is test/<class>/'),
    'a folder named .png': (lambda d: (d/'test'/'cat'/'2_cat.png').mkdir(), 'test/cat/2_cat.png: out of place, allowed is'),
}
bad_links = {
    'a pipe among the images': (lambda d: os.mkfifo(d/'train'/'cat'/'2_cat.png'), 'train/cat/2_cat.png: not a file; put the file'),
    'a symlink loop for an image': (lambda d: replace_by(d/'train'/'cat'/'1_cat.png', lambda p: p.symlink_to(p)), 'symbolic links'),
    'a symlink loop for a class': (lambda d: replace_by(d/'train'/'cat', lambda p: p.symlink_to(p)), 'symbolic links'),
    'a symlink loop for the data': (lambda d: replace_by(d, lambda p: p.symlink_to(p)), 'symbolic links'),
    'a class that links to the folder it is in': (lambda d: replace_by(d/'test'/'cat', lambda p: p.symlink_to('..')), 'out of place'),
    'a link that leads nowhere': (lambda d: replace_by(d/'train'/'cat'/'1_cat.png', lambda p: p.symlink_to('gone')), 'No such file'),
}


@pytest.mark.parametrize('what', [*bad_folders, *(pytest.param(w, marks=posix) for w in bad_links)])
def test_folders(tiny, refusal, fault, what):
    change, msg = (bad_folders | bad_links)[what]
    change(tiny)
    message = refusal(tiny)
    assert message.startswith(f'{tiny}: ') and msg in message
    if 'symbolic' in msg: assert message.endswith('; check its permissions, links and disk')
    fault('images', what, message)


def test_a_neighbour_that_cannot_be_read_does_no_harm(tiny, monkeypatch, refusal):
    "Such as lost+found, where the folder above is given"
    (tiny.parent/'lost+found').mkdir()
    real = os.stat
    def stat(p, **kw):
        if 'lost+found' in str(p): raise PermissionError(13, 'Permission denied', str(p))
        return real(p, **kw)
    monkeypatch.setattr(os, 'stat', stat)
    assert layouts.folder_root(tiny.parent) == tiny
    shutil.rmtree(tiny)
    monkeypatch.setattr(os.path, 'isdir', lambda p: True)
    assert 'lost+found' in refusal(tiny.parent)


@pytest.mark.parametrize('what, name', odd_names.items())
def test_names(tiny, tmp_path, refusal, fault, what, name):
    image = tiny/'test'/'cat'/f'1 {name}.png'
    make_odd(image.write_bytes, good)
    for src in (tiny, tar_of(tiny, tmp_path/'a.tgz')):
        ds = load_cifar(src, tmp_path/'cache')
        assert (ds.test.images == decode_png(good)).all((1, 2, 3)).any() and len(ds.test.labels) == 11
    fault('images', f'an image whose name has {what}', nothing + 'it is read as any other')
    image.write_bytes(b'not good')
    message = refusal(tiny)
    assert shown(image.name) in message and '\n' not in message
    assert refusal(tar_of(tiny, tmp_path/'a.tgz')).split(': ', 1)[1] == message.split(': ', 1)[1]
    fault('images', f'a bad image whose name has {what}', message)


@pytest.mark.parametrize('what, name', odd_names.items())
def test_paths(tmp_path, refusal, fault, what, name):
    "The data folder, the archive and the cache folder"
    make_odd((tmp_path/name).mkdir)
    src = write_fastai(tmp_path/name/name, tiny_arrays(10))
    tgz, cache = tar_of(src, tmp_path/name/f'{name}.tgz'), tmp_path/name/'cache'
    for p in (src, str(src), tgz, src.parent):
        assert_same(load_cifar(p, cache)[:2], tiny_arrays(10))
        assert load_cifar(p, cache).source == str(p)
    entry = cache/source_key(src)
    (entry/'meta.json').write_text('{')
    with pytest.warns(UserWarning) as w: load_cifar(src, cache)
    assert shown(entry) in str(w[0].message) and str(w[0].message).isprintable()
    fault('images', f'a path with {what}', nothing + 'data, archive and cache may have it')
    missing = refusal(tmp_path/name/'gone')
    assert f'{shown(tmp_path/name)}/gone: no such file or folder' in missing
    fault('images', f'a missing path with {what}', missing)
    (src/'train'/'cat'/'1_cat.png').write_bytes(b'not good')
    assert refusal(src).startswith(f'{shown(src)}: train/cat/1_cat.png: not a PNG')


def permission_script(*cases):
    "Load each (data, cache) without the rights of root; what it says, line by line"
    code = ('import os, sys\nfrom s9_fastai.cifar.load import load_cifar\n'
            'load_cifar("sample")  # whatever is imported late is imported now\n'
            'if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n'
            'for a in sys.argv[1:]:\n'
            '    try: print("read", len(load_cifar(*a.split("|")).test.labels))\n'
            '    except (ValueError, OSError) as e: print(e)\n')
    with TemporaryDirectory() as tmp:
        (Path(tmp)/'load.py').write_text(code, encoding='utf-8')
        done = run(Path(tmp)/'load.py', *map('|'.join, cases))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@posix
def test_permissions(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)  # paths from here on: the folders above may be root's own
    for d in ('image', 'class', 'all', 'fine'): write_fastai(Path(d), tiny_arrays(10))
    tar_of(Path('fine'), 'a.tgz')
    for d in ('.', 'cache'): os.makedirs(d, exist_ok=True), os.chmod(d, 0o777)
    os.mkdir('closed')
    locked = ['image/train/cat/1_cat.png', 'class/train/cat', 'all', 'a.tgz', 'closed']
    before = snapshot('.')
    for p in locked: os.chmod(p, 0)
    try: said = permission_script(*((p, 'cache') for p in ('image', 'class', 'all', 'a.tgz', 'fine')), ('fine', 'closed'))
    finally:
        for p in locked: os.chmod(p, 0o755)
    after = snapshot('.')
    assert {p: after[p] for p in before} == before and said.pop(4) == 'read 10'
    whats = ('an image', 'a class folder', 'a data folder', 'an archive', 'a cache folder')
    for what, path, line in zip(whats, ('image', 'class', 'all', 'a.tgz', 'closed'), said, strict=True):
        assert line.startswith(f'{path}: ') and 'Permission denied' in line
        assert ('check its permissions' if path != 'closed' else 'choose another folder with cache_dir') in line
        fault('images', f'{what} without the permission to read', steady(line))


# Paths that are none

no_paths = {
    'an empty path': ('', "the path of CIFAR-10 is '', an empty text; give a path, '.' for the current folder"),
    'the home of nobody': ('~nobody-of-this-name/x', 'there is no such home folder'),
    'a path with a zero byte': ('a\0b', 'a\\x00b: no such file or folder; give one with CIFAR-10, or the word "sample"'),
    'a path that is too long': ('x'*5000, 'File name too long'),
    'a pipe as data': ('pipe', 'pipe: not a file or a folder, but a pipe or a device; give one with CIFAR-10'),
    'a device as data': (os.devnull, 'not a file or a folder, but a pipe or a device'),
}


@posix
@pytest.mark.parametrize('what', no_paths)
def test_no_paths(tmp_path, monkeypatch, refusal, fault, what):
    path, msg = no_paths[what]
    monkeypatch.chdir(tmp_path)
    write_fastai(tmp_path, tiny_arrays(10))  # the current folder would do
    os.mkfifo('pipe')
    message = refusal(path)
    assert msg in message
    fault('images', what, message.replace('x'*5000, 'xxx…'))


def test_an_empty_cache_dir(tiny, tmp_path, monkeypatch, refusal, fault):
    monkeypatch.chdir(tmp_path)
    message = refusal(tiny, cache='')
    assert message.startswith("cache_dir is '', an empty text")
    fault('images', 'an empty path of the cache', message)


# Images for predict

reader_faults = {
    'a truncated file to predict': (lambda p: p.write_bytes(good[:-900]), ValueError, 'cannot be read as an image'),
    'a text file to predict': (lambda p: p.write_text('I am text'), ValueError, 'cannot be read as an image'),
    'a file of zero bytes to predict': (lambda p: p.touch(), ValueError, 'cannot be read as an image'),
    'an image of 10,000x10,000 to predict': (lambda p: p.write_bytes(bomb()), ValueError, '100000000 pixels, at most 89478485 are allowed; make it smaller'),
    'a missing file to predict': (lambda p: None, FileNotFoundError, 'no such file; give an image file'),
    'a folder to predict': (lambda p: p.mkdir(), FileNotFoundError, 'not a file; give an image file'),
    'a TIFF of 32 bits to predict': (lambda p: Image.fromarray(pixels(40, 40, dtype=np.int32)).save(p, 'tiff'), ValueError,
                                     'mode I, whose white is not known; x = np.asarray(image) has values 0 to 199: use x.astype("uint8") where white is 255, else (255*'),
}
if os.name != 'nt': reader_faults['a pipe to predict'] = os.mkfifo, FileNotFoundError, 'not a file; give an image file'


@pytest.fixture(scope='module')
def read(): return PixelReader(array_data(load_cifar('sample')))


@pytest.mark.parametrize('what', reader_faults)
def test_files_to_predict(tmp_path, read, fault, monkeypatch, what):
    make, exc, msg = reader_faults[what]
    make(path := tmp_path/'my\npicture.png')
    if 'x10,000' in what: monkeypatch.setattr('PIL.ImageFile.ImageFile.load', lambda self: pytest.fail('it was decoded'))
    before = snapshot(tmp_path)
    for o in (path, str(path)):
        with warnings.catch_warnings(), pytest.raises(exc) as e:
            warnings.simplefilter('error', UserWarning)
            read(o)
        assert type(e.value) is exc and str(e.value).isprintable() and snapshot(tmp_path) == before
        assert str(e.value).startswith(shown(path) + ': ') and msg in str(e.value)
    fault('images', what, e.value)


@pytest.mark.parametrize('what, image, grey', [
    ('a grey image', lambda: Image.new('L', (50, 40), 90), 90), ('an image with alpha', lambda: Image.new('RGBA', (9, 9), (90, 90, 90, 50)), round((255*205 + 90*50)/255)),
    ('an image of 16 bits', lambda: Image.fromarray(np.full((40, 40), 90*257, np.uint16)), 90),
    ('an animated image', lambda: Image.open(BytesIO(animation())), 0)])
def test_files_that_are_converted_to_predict(tmp_path, read, fault, what, image, grey):
    image().save(tmp_path/'a.png', save_all='animated' in what)
    for o in (image(), tmp_path/'a.png'): assert (read(o) == np.full((32, 32, 3), grey, np.uint8)).all()
    fault('images', f'{what} to predict', nothing + 'it is converted, not cut off')


def test_images_and_arrays_that_are_none_name_themselves(tmp_path, read):
    (tmp_path/'a.png').write_bytes(good[:-900])
    with pytest.raises(ValueError, match='a.png: cannot be read as an image'): read(Image.open(tmp_path/'a.png'))
    for o in (np.zeros((0, 5, 3), np.uint8), Image.new('RGB', (5, 0))):
        with pytest.raises(ValueError, match='^image: 5x0 pixels, at least 1x1 are needed'): read(o)


# Archives

def header(name, size, kind=tarfile.REGTYPE):
    "The header of a member that says it has `size` bytes"
    m = tarfile.TarInfo(name)
    m.size, m.type = max(size, 0), kind
    b = bytearray(m.tobuf(tarfile.GNU_FORMAT))
    if size < 0: b[124:136] = size.to_bytes(12, 'big', signed=True)
    return repaired(bytes(b))


def repaired(data):
    "`data`, a tar archive, with the right checksum in each header"
    data = bytearray(data)
    for i in range(0, len(data) - 511, 512):
        if data[i+257:i+262] != b'ustar': continue
        data[i+148:i+156] = b' '*8
        data[i+148:i+156] = b'%06o\0 ' % sum(data[i:i+512])
    return bytes(data)


def last_header(tar):
    with tarfile.open(fileobj=BytesIO(tar)) as tf: return tf.getmembers()[-1].offset


def steady(message): return re.sub(r'(0x|cifar10-)?[0-9a-f]{7,32}\b', r'\1…', str(message))  # without checksums


def flipped(data, i): return data[:i] + bytes([data[i] ^ 1]) + data[i+1:]


damage = {  # of an archive that is compressed with gzip
    'a truncated archive': lambda z: z[:-2000],
    'an archive without its last bytes': lambda z: z[:-3],
    'an archive with a wrong checksum': lambda z: flipped(z, len(z) - 8),
    'an archive of zero bytes': lambda z: b'',
    'a text file named .tgz': lambda z: b'I am text',
    'an archive cut between two members': lambda z: (t := gzip.decompress(z))[:last_header(t)],
    'an archive cut in a header': lambda z: (t := gzip.decompress(z))[:last_header(t) + 99],
    'an archive cut in a member': lambda z: (t := gzip.decompress(z))[:last_header(t) + 999],
    'an archive cut, then compressed': lambda z: gzip.compress((t := gzip.decompress(z))[:last_header(t)]),
    'an archive with a damaged header': lambda z: flipped(t := gzip.decompress(z), last_header(t)),
    'a header with a size below zero': lambda z: header('cifar10/x', -512) + gzip.decompress(z),
}


@pytest.mark.parametrize('what', damage)
def test_damaged_archives(tiny, tmp_path, refusal, fault, what):
    tgz = tar_of(tiny, tmp_path/'a.tgz')
    tgz.write_bytes(damage[what](tgz.read_bytes()))
    message = refusal(tgz)
    assert re.fullmatch(rf'{tgz}: not a tar archive, or damaged \(.*\); get it again', message)
    fault('archives', what, steady(message))


members = {
    'a member with ../': ('../../evil.png', {}), 'a member with ../ further on': ('cifar10/train/../../../evil.png', {}),
    'a member with an absolute path': ('/etc/evil.png', {}),
    'a link pointing outside': ('cifar10/train/cat/2_cat.png', dict(type=tarfile.SYMTYPE, linkname='../../../../etc/passwd')),
    'a link to an absolute path': ('cifar10/train/cat/2_cat.png', dict(type=tarfile.SYMTYPE, linkname='/etc/passwd')),
    'a hard link pointing outside': ('cifar10/train/cat/2_cat.png', dict(type=tarfile.LNKTYPE, linkname='../../secret')),
    'a device file': ('cifar10/train/cat/2_cat.png', dict(type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
    'a pipe in an archive': ('cifar10/train/cat/2_cat.png', dict(type=tarfile.FIFOTYPE)),
    'a member with ../ and a newline': ('../a\nb\x1b[31m.png', {}),
}


@pytest.mark.parametrize('what', members)
def test_members(tiny, tmp_path, refusal, fault, what):
    name, kw = members[what]
    m = tarfile.TarInfo(name)
    for k, v in kw.items(): setattr(m, k, v)
    with tarfile.open(tmp_path/'a.tgz', 'w:gz') as tf:
        tf.add(tiny, 'cifar10')
        tf.addfile(m)
    message = refusal(tmp_path/'a.tgz')  # which sees to it that there is no new file
    assert f'a.tgz: member {name!r} is refused (' in message and message.endswith('; get the archive from a trusted source')
    fault('archives', what, message)


def dtype_pickle():
    "An array of eight bytes whose type claims that they are the address of an object"
    kind = b'cnumpy\ndtype\n(X\x02\0\0\0V8\x89\x88tR(K\x03X\x01\0\0\0|NNNK\x08K\x01K\x01tb'
    return b'\x80\x03cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\1btR(K\1(K\1t' + kind + b'\x89C\x08' + b'A'*8 + b'tb.'


pickles = {
    'a pickle that runs a command': (lambda mark: next(evil_pickles(mark))[0], 'system is refused, only numpy arrays'),
    'a pickle that calls eval': (lambda mark: [p for p, name in evil_pickles(mark) if name == 'eval'][-1], 'eval is refused, only numpy'),
    'a pickle that writes a file': (lambda mark: [p for p, name in evil_pickles(mark) if name == 'memmap'][-1], 'memmap is refused'),
    'a pickle of Python objects': (lambda mark: pickle.dumps({'data': np.array([{}]), 'labels': [1]}), "an array of 'O8' is refused, only numbers"),
    'a pickle with forged addresses': (lambda mark: dtype_pickle(), "an array of 'V8' is refused, only numbers"),
}


@pytest.mark.parametrize('what', pickles)
def test_pickles(tmp_path, refusal, fault, what):
    data, msg = pickles[what]
    folder = write_batches(tmp_path/'tv'/'cifar-10-batches-py', tiny_arrays(10))
    (folder/'data_batch_2').write_bytes(data(tmp_path/'ran'))
    message = refusal(folder)
    assert f'{folder}: data_batch_2: not a CIFAR-10 batch (UnpicklingError: ' in message and msg in message
    assert refusal(tar_of(folder, tmp_path/'a.tar.gz')).split(': ', 1)[1] == message.split(': ', 1)[1]
    assert not (tmp_path/'ran').exists()
    fault('archives', what, message)


swells = {
    'a member of 1 GB in a small archive': (header('cifar10/train/cat/2_cat.png', 2**30), 'train/cat/2_cat.png: 1073741824 bytes, allowed'),
    'a name of 1 GB in a small archive': (header('x', 2**30, tarfile.GNUTYPE_LONGNAME), 'not a tar archive, or damaged'),
    'a record of 1 GB in a small archive': (header('x', 2**30, tarfile.XHDTYPE), 'not a tar archive, or damaged'),
}


@pytest.mark.parametrize('what', swells)
def test_archives_that_swell(tmp_path, refusal, fault, what):
    head, msg = swells[what]
    tgz = tmp_path/'a.tgz'
    tgz.write_bytes(gzip.compress(header('first', 0) + head) + gzip.compress(bytes(2**24))*64 + gzip.compress(bytes(1024)))
    assert tgz.stat().st_size < 2**21
    tracemalloc.start()
    try:
        message = refusal(tgz)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally: tracemalloc.stop()
    assert f'{tgz}: ' in message and msg in message
    fault('archives', what, message)


def test_an_archive_of_too_many_members(tiny, tmp_path, refusal, fault, monkeypatch):
    tgz = tar_of(tiny, tmp_path/'a.tgz')
    assert archive_files.__defaults__ == (2**29,)
    monkeypatch.setattr(archive_files, '__defaults__', (100_000,))
    message = refusal(tgz)
    assert message == f'{tgz}: more than 100000 bytes of members; unpack it and give the folder'
    fault('archives', 'an archive of more than memory can hold', message.replace('100000', str(2**29)))
    assert_same(load_cifar(tiny, tmp_path/'cache')[:2], tiny_arrays(10))  # the remedy


def test_an_archive_of_something_else(tmp_path, refusal, fault):
    (tmp_path/'cifar100').mkdir()
    (tmp_path/'cifar100'/'train').write_text('x')
    message = refusal(tar_of(tmp_path/'cifar100', tmp_path/'a.tgz'))
    assert 'train: out of place, allowed is train/<class>/<n>_<class>.png; move or remove it' in message
    (tmp_path/'cifar100'/'train').rename(tmp_path/'cifar100'/'fine_train')
    message = refusal(tar_of(tmp_path/'cifar100', tmp_path/'a.tgz'))
    assert 'a.tgz: no CIFAR-10 in this archive; it must hold train/ and test/, or data_batch_1, ' in message
    fault('archives', 'an archive of something else', message)


# The download

class Server(http.server.BaseHTTPRequestHandler):
    "Sends `head` and `body` of its server; `wait` seconds later it closes"
    head, body, wait, status = {}, b'', 0, 200

    def do_GET(self):
        self.send_response(self.server.status)
        for o in self.server.head.items(): self.send_header(*o)
        self.end_headers()
        self.wfile.write(self.server.body)
        self.wfile.flush()
        self.server.done.wait(self.server.wait)

    def log_message(self, *args): pass


@pytest.fixture
def archive(tmp_path):
    "What the server ought to send"
    return tar_of(write_fastai(tmp_path/'right'/'cifar10', tiny_arrays(10)), tmp_path/'right.tgz').read_bytes()


@pytest.fixture
def serve(home, tmp_path, archive, monkeypatch):
    "A function of what the server sends; fastai knows size and checksum of `archive`, unless `known` says otherwise"
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    server.done = threading.Event()
    url = f'http://127.0.0.1:{server.server_port}/cifar10.tgz'
    monkeypatch.setattr(downloading.URLs, 'CIFAR', url)
    def start(body, head=None, status=200, wait=0, known=True):
        server.body, server.status, server.wait = body, status, wait
        server.head = {'Content-Length': len(body)} if head is None else head
        monkeypatch.setattr(downloading, 'read_checks', lambda module: {url: path_stats(tmp_path/'right.tgz')} if known else {})
        return url
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield start
    server.done.set()
    server.shutdown()
    server.server_close()


def no_download(url, tmp_path, home):
    "The message of a download that fails, with the same port each time; neither a new file nor an old one less"
    arch = home/'archive'/'cifar10.tgz'
    with pytest.raises(FileNotFoundError) as e: load_cifar()
    assert list((home/'archive').iterdir()) == [] and not (home/'data').exists()
    arch.write_bytes(b'precious')
    before = snapshot(tmp_path)
    with pytest.raises(FileNotFoundError) as e2: downloading.download()
    assert snapshot(tmp_path) == before and arch.read_bytes() == b'precious'
    for o in ('S9_CIFAR10', str(home/'data'/'cifar10'), str(arch), f'the download of {url} failed (', "or give 'sample' for"):
        assert o in str(e.value)
    assert str(e.value) == str(e2.value) and str(e.value).isprintable()
    return str(e.value).replace(url.rsplit('/', 1)[0], 'http://…')


@pytest.mark.parametrize('known', [True, False])
def test_a_download_is_read_as_it_is(home, serve, archive, known, capsys):
    serve(archive, known=known)
    ds = load_cifar()
    assert_same(ds[:2], tiny_arrays(10))
    assert ds.source == str(home/'archive'/'cifar10.tgz') and Path(ds.source).read_bytes() == archive
    assert [p.name for p in (home/'archive').iterdir()] == ['cifar10.tgz']
    assert [p.name for p in (home/'data').iterdir()] == ['s9_fastai']  # not unpacked
    serve(b'', status=404)
    assert load_cifar().key == ds.key and capsys.readouterr() == ('', '')  # and not asked for again


html = b'<html><body>Please log in to the network</body></html>'*40
wrong = {
    'a download that is cut': (lambda z: dict(body=z[:5000], head={'Content-Length': len(z)}), 'cut off after 5000 of'),
    'a download that is cut, of a length not told': (lambda z: dict(body=z[:5000], head={}), 'got 5000 bytes with the checksum'),
    'a download that is cut, its checksum unknown': (lambda z: dict(body=z[:5000], head={}, known=False), 'not a tar archive, or damaged'),
    'a wrong file': (lambda z: dict(body=html), 'got 2160 bytes with the checksum'),
    'a wrong file, its checksum unknown': (lambda z: dict(body=html, known=False), 'not a tar archive, or damaged (ReadError'),
    'a wrong file of the right length': (lambda z: dict(body=flipped(z, 99)), 'bytes with the checksum'),
    'an archive of something else': (lambda z: dict(body=gzip.compress(bytes(10240)), known=False), 'no CIFAR-10 in this archive'),
    'a file that is not there': (lambda z: dict(body=html, status=404), 'HTTP Error 404'),
    'a download that stops': (lambda z: dict(body=z[:5000], head={'Content-Length': len(z)}, wait=9), 'timed out'),
}


@pytest.mark.parametrize('what', wrong)
def test_downloads(home, tmp_path, serve, archive, fault, monkeypatch, what):
    send, msg = wrong[what]
    monkeypatch.setattr(downloading.fetch, '__defaults__', (False, .3))
    url = serve(**send(archive))
    message = no_download(url, tmp_path, home)
    assert msg in message, message
    fault('download', what, steady(message).replace(str(len(archive)), '…'))


def test_a_refused_download(home, tmp_path, serve, fault, monkeypatch):
    serve(b'')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))  # a port where nobody listens
        url = f'http://127.0.0.1:{s.getsockname()[1]}/cifar10.tgz'
        monkeypatch.setattr(downloading.URLs, 'CIFAR', url)
        message = no_download(url, tmp_path, home)
    assert 'refused' in message
    fault('download', 'a refused download', message)


def test_a_download_that_is_stopped_by_hand(home, serve, archive, monkeypatch):
    got = []
    def stop(path, *args):
        got.append(path.read_bytes())
        raise KeyboardInterrupt
    serve(archive)
    monkeypatch.setattr(downloading, 'check_download', stop)
    with pytest.raises(KeyboardInterrupt): load_cifar()
    assert list((home/'archive').iterdir()) == [] and got == [archive]


@pytest.mark.parametrize('told', [True, False])
def test_the_bar_of_a_download(home, serve, archive, monkeypatch, capsys, told):
    "Also where the server does not tell the length, which fastdownload's bar takes for minus one byte"
    serve(archive, head=None if told else {})
    monkeypatch.setattr(downloading, 'show_bars', lambda progress: progress)
    downloading.fetch(downloading.URLs.CIFAR, home.parent/'got', True)
    out = capsys.readouterr().out
    assert (home.parent/'got').read_bytes() == archive and ('100.00%' in out) == told and len(out) < 9000


# The cache

entries = {
    'a cache damaged afterwards': lambda d: (d/'train_images.npy').write_bytes(flipped((d/'train_images.npy').read_bytes(), 999)),
    'a cache cut afterwards': lambda d: (d/'test_images.npy').write_bytes((d/'test_images.npy').read_bytes()[:-999]),
    'a cache with a file gone': lambda d: (d/'test_labels.npy').unlink(),
    'a file in the place of a cache entry': lambda d: replace_by(d, Path.touch),
}


@pytest.mark.parametrize('what', entries)
def test_damaged_entries(tiny, tmp_path, cache, fault, what):
    ds = load_cifar(tiny, cache)
    key, before = ds.key, snapshot(tmp_path)
    entry = cache/source_key(tiny)
    del ds
    entries[what](entry)
    with pytest.warns(UserWarning) as w: ds = load_cifar(tiny, cache)
    assert_same(ds[:2], tiny_arrays(10))
    assert ds.key == key and snapshot(tmp_path) == before  # the entry again, to the byte; the other one and the data untouched
    assert len(w) == 1 and str(w[0].message).startswith(f'{entry}: the cache is damaged (')
    fault('download', what, steady(w[0].message))


def test_a_damaged_entry_that_cannot_be_replaced(tiny, cache, fault, monkeypatch):
    load_cifar(tiny, cache)
    entry = cache/source_key(tiny)
    (entry/'meta.json').unlink()
    monkeypatch.setattr(data_cache, 'remove_entry', lambda d: None)
    with pytest.warns(UserWarning), pytest.raises(OSError) as e: load_cifar(tiny, cache)
    assert str(e.value).endswith('and cannot be replaced; remove it, or choose another cache_dir') and entry.exists()
    fault('download', 'a damaged cache that cannot be replaced', steady(e.value))


def test_two_processes_build_the_same_cache_at_once(tiny, tmp_path, cache, fault):
    code = ('import sys, time, warnings, s9_fastai.data.cache as c, s9_fastai.cifar.load as load\nfrom pathlib import Path\n'
            'real = c.build_entry\n'
            'def build(*a):\n'  # both are about to write before either one does
            '    Path(sys.argv[3]).touch()\n'
            '    while not all(Path(p).exists() for p in sys.argv[3:]): time.sleep(.01)\n'
            '    real(*a)\n'
            'c.build_entry = build\n'
            'warnings.simplefilter("error", UserWarning)\n'
            'print(load.load_cifar(*sys.argv[1:3]).key)')
    marks, other = [str(tmp_path/'m0'), str(tmp_path/'m1')], snapshot(cache)
    (tmp_path/'load.py').write_text(code)
    done = [p.end() for p in [Script(tmp_path/'load.py', tiny, cache, *m) for m in (marks, marks[::-1])]]
    ds = load_cifar(tiny, cache)
    assert [(o.returncode, o.stdout, o.stderr) for o in done] == [(0, f'{ds.key}\n', '')]*2
    assert_same(ds[:2], tiny_arrays(10))
    assert len(list(cache.iterdir())) == 2 and other.items() <= snapshot(cache).items()
    fault('download', 'two processes that build the same cache at once', nothing + 'both end with the same images')


# The command

def evil_batches(folder):
    batches = write_batches(folder/'batches', tiny_arrays(10))
    (batches/BATCHES[0]).write_bytes(next(evil_pickles(folder/'ran'))[0])
    return batches


commands = {  # what: group, data, message
    "s9_train --data ''": ('images', lambda d: '', "the path of CIFAR-10 is '', an empty text"),
    's9_train on a pipe': ('images', lambda d: os.mkfifo(d.parent/'pipe') or 'pipe', 'pipe: not a file or a folder'),
    's9_train on an animated image named with a newline': (
        'images', lambda d: (d/'test'/'cat'/'1_\n.png').write_bytes(animation()) and d, 'test/cat/1_\\n.png: an animation, only'),
    's9_train on a missing path with bytes that are no text': ('images', lambda d: os.fsdecode(b'gone\xff'), 'gone\\udcff: no such file'),
    's9_train on the home of nobody': ('images', lambda d: '~nobody-of-this-name', 'there is no such home folder'),
    's9_train on a symlink loop': ('images', lambda d: (d.parent/'loop').symlink_to('loop') or d.parent/'loop', 'symbolic links'),
    's9_train on a truncated archive': (
        'archives', lambda d: tar_of(d, d.parent/'a.tgz').write_bytes(b'\x1f\x8b\x08') and d.parent/'a.tgz', 'not a tar archive, or damaged'),
    's9_train on a pickle that runs a command': ('archives', lambda d: evil_batches(d.parent), 'system is refused'),
    's9_train without data or network': ('download', lambda d: None, 'failed (OSError: Network is unreachable). Give a path'),
}


@posix
@pytest.mark.parametrize('what', commands)
def test_the_command(tiny, tmp_path, home, fault, monkeypatch, capsys, what):
    group, make, msg = commands[what]
    monkeypatch.chdir(tiny.parent)
    load_cifar(write_fastai(tmp_path/'other', tiny_arrays(10)))  # there is a cache
    (home/'archive').mkdir()
    path = make(tiny)
    def no_network(*a, **k): raise OSError('Network is unreachable')
    monkeypatch.setattr(downloading, 'urlopen', no_network)
    monkeypatch.setattr(sys, 'argv', ['s9_train', *(['--data', str(path)] if path is not None else [])])
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as e: main_train()
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == '' and err.count('\n') == 1 and err[:-1].isprintable()
    assert err.startswith('s9_train: ') and err.endswith(' (see s9_train --help)\n')
    assert msg in err and snapshot(tmp_path) == before
    fault(group, what, err)


# Anything

changes = st.lists(st.tuples(st.sampled_from(['flip', 'cut', 'end', 'insert', 'repeat']), st.integers(0, 2**20), st.integers(1, 700)),
                   min_size=1, max_size=4)


def changed(data, changes):
    data = bytearray(data)
    for how, i, n in changes:
        i %= len(data) or 1
        if how == 'flip': data[i:i+1] = bytes(b ^ 1 << n % 8 for b in data[i:i+1])
        if how == 'cut': del data[i:i+n]
        if how == 'end': del data[-n:]
        if how == 'insert': data[i:i] = bytes([n % 256])*n
        if how == 'repeat': data[i:i] = data[i:i+n]
    return bytes(data)


def fuzz(n): return settings(derandomize=True, deadline=None, max_examples=n, database=None)


@pytest.mark.parametrize('layout, mode', [('fastai', 'w'), ('fastai', 'w:gz'), ('torchvision', 'w'), ('torchvision', 'w:gz')])
def test_archives_of_changed_bytes(tmp_path, monkeypatch, layout, mode):
    folder = write_fastai(tmp_path/'d', tiny_arrays(10)) if layout == 'fastai' else write_batches(tmp_path/'d', tiny_arrays(10))
    data, src, read = tar_of(folder, tmp_path/'a', mode).read_bytes(), tmp_path/'changed', []
    monkeypatch.setattr(os, 'fsync', lambda fd: None)

    @fuzz(450 if mode == 'w' else 60)
    @given(changes, st.booleans())
    def check(changes, repair):
        src.write_bytes(repaired(changed(data, changes)) if repair else changed(data, changes))
        os.utime(src, ns=(0, len(read)))  # a time of its own, so that it is not taken for the one before
        read.append(False)
        try: ds = load_cifar(src, tmp_path/'cache')
        except (ValueError, OSError) as e:
            assert type(e) is ValueError and str(e).startswith(f'{src}: ') and str(e).isprintable()
            return
        read[-1] = True
        for x, y in ds[:2]:
            assert x.dtype == np.uint8 and x.shape == (len(y), 32, 32, 3) and y.dtype == np.int64
            assert set(y.tolist()) == set(range(10))
    check()
    assert not all(read) and (any(read) or mode != 'w')


def recrc(data):
    "`data`, a PNG file, with the right checksum for each chunk, so that the change comes through to the decoder"
    data, i = bytearray(data), 8
    while i + 12 <= len(data):
        n = int.from_bytes(data[i:i+4], 'big')
        if i + 12 + n > len(data): break
        data[i+8+n:i+12+n] = zlib.crc32(data[i+4:i+8+n]).to_bytes(4, 'big')
        i += 12 + n
    return bytes(data)


@fuzz(2000)
@given(changes, st.booleans())
def test_images_of_changed_bytes(changes, repair):
    data = changed(good, changes)
    try: x = decode_png(recrc(data) if repair else data, 'a.png')
    except ValueError as e: assert type(e) is ValueError and str(e).startswith('a.png: ') and str(e).isprintable()
    else: assert x.dtype == np.uint8 and x.shape == (32, 32, 3)
