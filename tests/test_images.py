"The faults of folders and tables of images, as a user meets them: one line with what is wrong and what to do, nothing lost, and the remedy works"
import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import quick_train, run
from test_cifar import home  # noqa: F401, a fixture
from test_faults_data import make_odd, odd_names, posix, replace_by, snapshot, steady

import s9_fastai.app.training  # noqa: F401, its libraries warn when they are first imported
import s9_fastai.data.decode as decode
from s9_fastai.app.train import main_train
from s9_fastai.core.files import read_input
from s9_fastai.data.loaders import image_dls
from s9_fastai.data.tables import Columns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'/'trust'))
import kill  # noqa: E402

nothing = 'no message: '  # for the faults that do no harm
rng = np.random.default_rng(0)


def save(path, image=None, **kwargs):
    "An image of noise at `path`, another each time"
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))).save(path, **kwargs)


def as_bytes(kind, *size):
    f = BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(f, kind)
    return f.getvalue()


@pytest.fixture
def photos(tmp_path):
    "Four images of each of two classes"
    for c in ('cat', 'dog'):
        for i in range(4): save(tmp_path/'photos'/c/f'{i}.png')
    return tmp_path/'photos'


@pytest.fixture
def load(tmp_path):
    "A function of a path: its loaders, and the texts of the warnings"
    def get(path, cache=tmp_path/'cache', **kwargs):
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            dls = image_dls(path, **{'size': 8, 'bs': 4, 'seed': 1, **kwargs}, cache_dir=cache, device='cpu')
        return dls, [str(o.message) for o in w]
    return get


@pytest.fixture
def refusal(tmp_path, load):
    "A function of a path: the one line with which it is refused, when all but the cache is as it was before"
    def get(path, **kwargs):
        def others(): return {k: v for k, v in snapshot(tmp_path).items() if not str(k).startswith(str(tmp_path/'cache'))}
        before = others()
        before.pop(str(tmp_path), None)
        with pytest.raises((ValueError, OSError)) as e: load(path, **kwargs)
        message = str(e.value)
        assert message.isprintable() and len(message) < 1000 and type(e.value) in (ValueError, OSError, FileNotFoundError, PermissionError, IsADirectoryError)
        after = others()
        assert {k: after.get(k) for k in before} == before
        return message
    return get


# Images

def bomb(p): Image.new('1', (10_000, 10_000)).save(p)
def link_loop(p): p.symlink_to(p)
def huge_file(p):
    with open(p, 'wb') as f: f.truncate(2**28 + 1)


bad_images = {
    'a truncated JPEG': ('9.jpg', lambda p: p.write_bytes(as_bytes('jpeg', 60, 60)[:-900]), 'cannot be read as an image (OSError: image file is truncated'),
    'a text file named .png': ('9.png', lambda p: p.write_text('I am text'), "cannot be read as an image (UnidentifiedImageError: 9 bytes, which begin with b'I am tex'"),
    'an image of zero bytes': ('9.png', lambda p: p.touch(), 'cannot be read as an image (UnidentifiedImageError: 0 bytes'),
    'an image of 0 pixels': ('9.ppm', lambda p: p.write_bytes(b'P6 0 0 255\n'), 'cannot be read as an image'),
    'an image of 10,000x10,000': ('9.png', bomb, '100000000 pixels, at most 89478485 are allowed; make it smaller'),
    'an image file of more than 256 MB': ('9.png', huge_file, 'cannot be read as an image (ValueError: '),
    'an image of 32 bits': ('9.tif', lambda p: Image.fromarray(np.arange(99, dtype=np.int32).reshape(9, 11)).save(p), 'mode I, whose white is not known'),
}
bad_links = {
    'a pipe in the place of an image': ('9.png', os.mkfifo if os.name != 'nt' else None, 'not a file; give an image file'),
    'a link that leads nowhere in the place of an image': ('9.png', lambda p: p.symlink_to('gone'), 'no such file; give an image file'),
}


@pytest.mark.parametrize('what', [*bad_images, *(pytest.param(w, marks=posix) for w in bad_links)])
def test_images(photos, load, refusal, fault, what):
    name, make, msg = (bad_images | bad_links)[what]
    make(path := photos/'cat'/name)
    message = refusal(photos)
    assert message.startswith(f'{path}: {msg}') and message.endswith('; or leave them out, with skip_bad')
    fault('folders', what, message)
    dls, said = load(photos, skip_bad=True)
    assert len(dls.train_ds) + len(dls.valid_ds) == 8 and said == [f'files left out, since they cannot be read (1): cat/{name}']
    path.unlink()
    assert len(load(photos)[0].train_ds) == 6 and load(photos)[1] == []


def test_many_bad_images(photos, refusal, fault):
    "The first one in full, and their number"
    for i in range(90): (photos/'dog'/f'bad {i}.png').touch()
    message = refusal(photos)
    assert '(90 files in all cannot be read)' in message and message.count('bad ') == 1
    fault('folders', 'many unreadable images', message)


def test_an_image_without_the_permission_to_read(photos, load, refusal, fault, monkeypatch):
    "The permission changes neither size nor time of the file, and still the image is read as soon as it is given"
    import s9_fastai.data.images as images
    def read(path, limit):
        if str(path).endswith('cat/2.png'): raise PermissionError(13, 'Permission denied', str(path))
        return read_input(path, limit)
    with monkeypatch.context() as m:
        m.setattr(images, 'read_input', read)
        message = refusal(photos)
        assert message.startswith(f'{photos}/cat/2.png: cannot be read as an image (PermissionError: [Errno 13] Permission denied')
        fault('folders', 'an image without the permission to read', message)
        dls, said = load(photos, skip_bad=True)
        assert len(dls.train_ds) + len(dls.valid_ds) == 7 and len(said) == 1
    assert len(load(photos)[0].train_ds) == 6


# Folders

def moved(d, *names):
    "The classes of `d`, moved into folders of the given names, the same ones in each"
    (d/'cat').rename(d.parent/'cat'), (d/'dog').rename(d.parent/'dog')
    for nm in names: [shutil.copytree(d.parent/c, d/nm/c) for c in ('cat', 'dog')]
    for p in sorted(d.glob('*/*/*')): save(p)
    shutil.rmtree(d.parent/'cat'), shutil.rmtree(d.parent/'dog')


def nest(d):
    here = os.getcwd()
    os.chdir(d/'cat')
    for _ in range(150):
        os.mkdir('a')
        os.chdir('a')
    os.chdir(here)


def only(d, *names):
    for p in (d/'cat').iterdir():
        if p.name not in names: p.unlink()


bad_folders = {  # what: change, message, remedy
    'a folder with nothing in it': (lambda d: replace_by(d, Path.mkdir), 'no folder of a class with images; give a folder with train/<class>/',
                                    lambda d: [save(d/c/f'{i}.png') for c in 'ab' for i in range(4)]),
    'images without folders of classes': (lambda d: [replace_by(d, Path.mkdir), save(d/'1.png')], 'no folder of a class with images; give a folder with train/<class>/',
                                          lambda d: [(d/'1.png').unlink(), [save(d/c/f'{i}.png') for c in 'ab' for i in range(4)]]),
    'a class folder without an image': (lambda d: (d/'cow').mkdir(), '/cow: no image in this folder; add one, or remove it', lambda d: (d/'cow').rmdir()),
    'one class': (lambda d: shutil.rmtree(d/'cat'), 'one class, dog; at least two are needed', lambda d: [save(d/'cat'/f'{i}.png') for i in range(4)]),
    'a class with one image': (lambda d: only(d, '1.png'), 'cat has one image only, and a split needs two of each class', lambda d: [save(d/'cat'/f'{i}.png') for i in range(4)]),
    'an image outside of the class folders': (lambda d: save(d/'9.png'), '/9.png: an image outside of a folder of its class; move it into one', lambda d: (d/'9.png').unlink()),
    'a class with validation images only': (lambda d: [moved(d, 'train', 'valid'), shutil.rmtree(d/'train'/'cat'), save(d/'train'/'cow'/'1.png')],
                                            'cat has validation images and no training image; add some, or remove the class', lambda d: save(d/'train'/'cat'/'1.png')),
    'a validation folder without a class': (lambda d: [moved(d, 'train'), (d/'valid').mkdir()], '/valid: no folder of a class with images; add them, or remove this folder',
                                            lambda d: (d/'valid').rmdir()),
    'splits under other names': (lambda d: moved(d, 'Training', 'Testing'), 'Testing, Training are splits by their names, and not classes; rename the one to train from to train',
                                 lambda d: [(d/'Training').rename(d/'train'), (d/'Testing').rename(d/'valid')]),
    'folders nested 150 times': (nest, 'folders nested 100 times; move the images up', lambda d: shutil.rmtree(d/'cat'/'a')),
}
linked_folders = {
    'a class that links to itself': (lambda d: (d/'cow').symlink_to('cow'), 'Too many levels of symbolic links', lambda d: (d/'cow').unlink()),
    'a link to a folder above it': (lambda d: (d/'cat'/'up').symlink_to('..'), '/cat/up: a link to a folder above it; remove the link', lambda d: (d/'cat'/'up').unlink()),
    'a class that links to a missing folder': (lambda d: (d/'cow').symlink_to('gone'), '/cow: a link that leads nowhere; restore what it leads to, or remove it',
                                               lambda d: (d/'cow').unlink()),
    'an image that links to itself': (lambda d: link_loop(d/'cat'/'9.png'), 'Too many levels of symbolic links', lambda d: (d/'cat'/'9.png').unlink()),
    'a folder that links to itself': (lambda d: replace_by(d, link_loop), 'Too many levels of symbolic links',
                                      lambda d: [d.unlink(), [save(d/c/f'{i}.png') for c in 'ab' for i in range(4)]]),
}


@pytest.mark.parametrize('what', [*bad_folders, *(pytest.param(w, marks=posix) for w in linked_folders)])
def test_folders(photos, load, refusal, fault, what):
    change, msg, mend = (bad_folders | linked_folders)[what]
    change(photos)
    message = refusal(photos)
    assert msg in message
    fault('folders', what, re.sub('(/a){9,}/?', '/a…', message))
    mend(photos)
    assert load(photos)[0].c >= 2


def test_a_folder_without_the_permission_to_read(photos, load, refusal, fault, monkeypatch):
    real = os.scandir
    def scandir(p):
        if str(p).endswith('dog'): raise PermissionError(13, 'Permission denied', str(p))
        return real(p)
    with monkeypatch.context() as m:
        m.setattr(os, 'scandir', scandir)
        message = refusal(photos)
        assert 'Permission denied' in message and message.endswith('check its permissions, links and disk')
        fault('folders', 'a folder without the permission to read', message)
    assert load(photos)[0].c == 2


@posix
def test_a_pipe_beside_the_classes_does_no_harm(photos, load, fault):
    os.mkfifo(photos/'9.png')
    assert load(photos)[0].c == 2
    fault('folders', 'a pipe beside the class folders', nothing + 'only folders and images are looked at there')


names = {**odd_names, 'control characters': 'a\x1b[31m\x07', '255 bytes': 'ü'*127 + 'x'}


@pytest.mark.parametrize('what', names)
def test_names_of_classes(photos, tmp_path, load, refusal, fault, what):
    make_odd((photos/'cat').rename, photos/names[what])
    if what == 'bytes that are no text':
        message = refusal(photos)
        assert message.endswith('a class name that is not UTF-8; rename it')
        (photos/names[what]).rename(photos/'cat')
        assert [*load(photos)[0].vocab] == ['cat', 'dog']
    else:
        dls, said = load(photos)
        assert {*dls.vocab} == {names[what], 'dog'} and said == []
        dls.source.report.items.write(tmp_path/'split.csv')
        split = load(dls.source.report.items.root, seed=2)[0]  # by the folder again
        assert [*split.vocab] == [*dls.vocab] and str(dls.source.report).replace('\n', '').isprintable()
        message = nothing + 'it is read as any other'
    fault('folders', f'a class whose name has {what}', message)


def test_the_written_split_is_a_table_of_the_same_images(photos, load):
    "Even with names of classes and files that need quotes"
    (photos/'cat').rename(photos/'c"a,t;\n')
    items = load(photos)[0].source.report.items
    items.write(photos/'split.csv')
    again = load(photos/'split.csv')[0].source.report.items
    assert {*zip(again.files, again.labels, again.is_valid)} == {*zip(items.files, (o.strip() for o in items.labels), items.is_valid)}


# Tables

rows = ''.join(f'{c}/{i}.png,{c}\n' for c in ('cat', 'dog') for i in range(4))
good = f'file,label\n{rows}'
several = dict(columns=Columns(delim=' '))
bad_tables = {  # what: text, options, message
    'a missing file in a table': (f'{good}cat/9.png,cat\n', {}, 'cat/9.png is not a file in'),
    'a row without a file name': (f'{good},cat\n', {}, 'an empty name is not a file in'),
    'a table without the usual columns': (f'x,y\n{rows}', {}, 'no column of files; the columns are x, y: name one'),
    'a table without names of columns': (rows, {}, 'no column of files; the columns are cat/0.png, cat: name one, or give the first row'),
    'a column that is not there': (good, dict(columns=Columns(labels='breed')), 'no column breed; the columns are file, label: name one'),
    'a file in two rows': (f'{good}cat/0.png,dog\n', {}, 'cat/0.png is there twice (rows 2, 10); leave one row'),
    'an empty label': (good.replace('cat/1.png,cat', 'cat/1.png, '), {}, 'no label (row 3); give one, or remove the row'),
    'a row without a label': (good.replace('cat/1.png,cat', 'cat/1.png'), {}, 'no label (row 3); give one, or remove the row'),
    'no label in any row': ('file,label\ncat/0.png,\ndog/0.png,\n', several, 'no image has a label; add some, or name another column'),
    'one label in all rows': (good.replace(',dog', ',cat'), {}, 'one class, cat; at least two are needed'),
    'a label of 100,000 characters': (good.replace(',dog', ',' + 'x'*100_000), {}, 'a class name of 100000 characters, but at most 255 are allowed; shorten it'),
    'another label for each image': (''.join(f'{ln.split(",")[0]},{i}\n' if i else f'{ln}\n' for i, ln in enumerate(good.splitlines())), {}, 'has one image only, and a split needs two'),
    'a split of another name': (good.replace('\n', ',train\n').replace('label,train', 'label,split').replace('cat/2.png,cat,train', 'cat/2.png,cat,x'), {},
                                "the split is 'x' (row 4), but must be train, valid or test"),
    'a table with no validation image': (good.replace('\n', ',train\n').replace('label,train', 'label,split'), {}, 'no validation image; at least one is needed'),
    'an empty table': ('', {}, 'cannot be read as a table (EmptyDataError'),
    'a table with names of columns only': ('file,label\n', {}, 'no row; at least two are needed'),
    'a table that is not UTF-8': (f'{good}cat/é.png,cat\n'.encode('latin-1'), {}, 'cannot be read as a table (UnicodeDecodeError'),
    'a table in UTF-16': (good.encode('utf-16'), {}, 'cannot be read as a table (UnicodeDecodeError'),
    'a table separated by semicolons': (good.replace(',', ';'), {}, "one column, file;label; separate the cells by commas in place of ';'"),
    'a .csv separated by tabs': (good.replace(',', '\t'), {}, "separate the cells by commas in place of '\\t'"),
    'cells without a name of a column': (good.replace('\n', ',\n').replace('label,', 'label'), {}, 'rows have more cells than the first row has names of columns; name them all'),
    'one row with more cells': (good + 'cat/9.png,cat,x\n', {}, 'cannot be read as a table (ParserError'),
    'a quote that is never closed': (good + '"cat/9.png,cat\n', {}, 'cannot be read as a table (ParserError'),
    'a zero byte in a file name': (good + 'a\0b.png,cat\n', {}, 'a\\x00b.png is not a file in'),
}


@pytest.mark.parametrize('what', bad_tables)
def test_tables(photos, load, refusal, fault, what):
    text, options, msg = bad_tables[what]
    table = photos/'labels.csv'
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(table, **options)
    assert msg in message and re.search('; |: (name|add) |must be', message)
    fault('folders', what, message)
    table.write_text(good)
    assert [*load(table)[0].vocab] == ['cat', 'dog']


harmless_tables = {
    'a table with a byte order mark': lambda d: ('\ufeff' + good).encode(),
    'absolute paths in a table': lambda d: good.replace('cat/', f'{d}/cat/').replace('dog/', f'{d}/dog/').encode(),
    'paths that leave the folder of the table': lambda d: good.replace('cat/', f'../{d.name}/cat/').encode(),
    'spaces around cells, and lines that end as on Windows': lambda d: good.replace(',cat', ' , cat').replace('\n', '\r\n').encode(),
    'a class called NA': lambda d: good.replace(',cat', ',NA').encode(),
}


@pytest.mark.parametrize('what', harmless_tables)
def test_tables_that_are_read(photos, load, fault, what):
    (photos/'labels.csv').write_bytes(harmless_tables[what](photos))
    dls, said = load(photos/'labels.csv')
    assert (dls.c, len(dls.train_ds), len(dls.valid_ds), said) == (2, 6, 2, [])
    fault('folders', what, nothing + 'it is read as meant')


def test_parquet_without_pyarrow(photos, load, refusal, fault, monkeypatch):
    (photos/'labels.parquet').write_bytes(b'PAR1')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'fastparquet', None)
    message = refusal(photos/'labels.parquet')
    assert message.endswith('labels.parquet: parquet needs pyarrow: pip install pyarrow')
    fault('folders', 'a parquet table without pyarrow', message)
    (photos/'labels.csv').write_text(good)
    assert load(photos/'labels.csv')[0].c == 2


def test_a_table_of_many_rows_with_missing_files(photos, refusal, fault):
    (photos/'labels.csv').write_text('file,label\n' + ''.join(f'photo {i}.png,{i % 7}\n' for i in range(100_000)))
    start = time.monotonic()
    message = refusal(photos/'labels.csv')
    assert time.monotonic() - start < 20 and '(rows 2, 3, 4, 5, 6 and 99995 more)' in message
    fault('folders', 'a table of 100,000 missing files', message)


paths = {
    'a pipe in the place of a table': (lambda d: os.mkfifo(d/'t.csv') or d/'t.csv', 'a pipe, but only regular files are read; put a file in its place'),
    'a missing table': (lambda d: d/'gone.csv', 'gone.csv: no such file or folder; give a folder of images or a table'),
    'a table of another kind': (lambda d: (d/'t.xlsx').touch() or d/'t.xlsx', 't.xlsx: neither a folder, a table (.csv, .tsv, .parquet) nor an archive (.zip, .tar,'),
    'a table with a zero byte in its path': (lambda d: 'a\0b.csv', 'a\\x00b.csv: no such file or folder'),
    'an empty path of the images': (lambda d: '', "the path of the images is '', an empty text"),
}


@posix
@pytest.mark.parametrize('what', paths)
def test_paths(photos, load, refusal, fault, what):
    make, msg = paths[what]
    message = refusal(make(photos))
    assert msg in message
    fault('folders', what, message)
    assert load(photos)[0].c == 2


class_files = {
    'a missing file of classes': (None, 'cannot be read (FileNotFoundError'),
    'a label that is not in the file of classes': ('cat\ncow\n', 'dog is a label, but not in this file; add it'),
    'a class that is twice in the file of classes': ('cat\ndog\ncat\n', 'cat is there twice; remove one'),
}


@pytest.mark.parametrize('what', class_files)
def test_files_of_classes(photos, tmp_path, load, refusal, fault, what):
    text, msg = class_files[what]
    file = tmp_path/'classes.txt'
    if text: file.write_text(text)
    message = refusal(photos, classes=file)
    assert message.startswith(f'{file}: ') and msg in message
    fault('folders', what, message)
    file.write_text('dog\ncat\n', encoding='utf-8-sig')
    assert [*load(photos, classes=file)[0].vocab] == ['dog', 'cat']


# What is in the images

def test_equal_images_in_both_splits(photos, load, fault):
    items = load(photos)[0].source.report.items
    train, valid = (items.files[items.indices(o)[0]] for o in (False, True))  # of one class
    shutil.copy(photos/train, photos/valid)
    _, said = load(photos)
    assert said == [f'validation images that are training images too, so that the accuracy will be too high (1): {valid} is {train}']
    fault('folders', 'an image in training and in validation', said[0])
    (photos/valid).unlink(), save(photos/valid)
    assert load(photos)[1] == []


def test_equal_images_with_different_labels(photos, load, fault):
    Image.open(photos/'cat'/'0.png').save(photos/'dog'/'0.bmp')  # another file, the same pixels
    said = load(photos)[1][-1]
    assert said == 'equal images with different labels (1): cat/0.png and dog/0.bmp'
    fault('folders', 'one image with two labels', said)


# The cache

def test_a_folder_that_changes_while_it_is_decoded(photos, tmp_path, load, refusal, fault, monkeypatch):
    real = decode._decode_all
    def change(*args):
        found = real(*args)
        os.utime(photos/'cat'/'0.png', (1, 1))
        return found
    with monkeypatch.context() as m:
        m.setattr(decode, '_decode_all', change)
        with pytest.raises(ValueError, match='files have changed while they were read; begin again') as e: load(photos)
        fault('folders', 'a folder that changes while it is decoded', e.value)
    assert not any((tmp_path/'cache').iterdir())  # nothing that may be wrong is kept
    assert load(photos)[0].c == 2


def only_entry(tmp_path):
    entry, = (tmp_path/'cache').iterdir()
    return entry


entries = {
    'decoded images that are damaged': lambda d: (d/'images.npy').write_bytes((d/'images.npy').read_bytes()[:-3] + b'abc'),
    'decoded images that are cut short': lambda d: (d/'images.npy').write_bytes((d/'images.npy').read_bytes()[:-30]),
    'decoded images without their sizes': lambda d: (d/'sizes.npy').unlink(),
    'decoded images of another version': lambda d: (d/'meta.json').write_text('{"images": "another form"}'),
}


@pytest.mark.parametrize('what', entries)
def test_entries(photos, tmp_path, load, fault, what):
    key = load(photos)[0].source.key
    before = snapshot(entry := only_entry(tmp_path))
    entries[what](entry)
    dls, said = load(photos)
    assert dls.source.key == key and snapshot(entry) == before and only_entry(tmp_path) == entry
    assert len(said) == 1 and said[0].startswith(f'{entry}: the cache is damaged (') and said[0].endswith(f'; it is made again from {photos}')
    fault('folders', what, steady(said[0]))


def no_space(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@posix
def test_a_full_disk(photos, tmp_path, load, refusal, fault, monkeypatch):
    "The space is taken before the first image is decoded, and missing space is no end of the process"
    with monkeypatch.context() as m:
        m.setattr(os, 'posix_fallocate', no_space, raising=False)
        m.setattr(decode, '_decode_all', lambda *_: pytest.fail('decoded'))
        message = refusal(photos)
    assert 'the cache cannot be written there (OSError: [Errno 28] No space left on device); choose another folder with cache_dir' in message
    fault('folders', 'a disk that is full', message)
    assert not any((tmp_path/'cache').iterdir())
    with monkeypatch.context() as m:  # the files are read again in each epoch
        m.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(9999, 9999, 99))
        [text] = load(photos)[1]
    assert 'are not stored' in text and 'Take a smaller size, or another folder with cache_dir' in text
    fault('folders', 'more images than the disk has room for', text)
    assert load(photos)[0].c == load(photos, cache=tmp_path/'other')[0].c == 2


def test_a_file_in_the_place_of_the_cache(photos, tmp_path, load, refusal, fault):
    (tmp_path/'file').touch()
    message = refusal(photos, cache=tmp_path/'file')
    assert message.startswith(f'{tmp_path}/file: the cache cannot be written there (')
    fault('folders', 'a file in the place of the folder of the cache', message)
    assert load(photos, cache=tmp_path/'other')[0].c == 2


both = '''
import sys, time, warnings, s9_fastai.data.cache as c
from pathlib import Path
from s9_fastai.data.loaders import image_dls
real = c.build_entry
def build(*args):  # both are about to write before either one does
    Path(sys.argv[3]).touch()
    while not all(Path(p).exists() for p in sys.argv[3:]): time.sleep(.01)
    real(*args)
c.build_entry = build
warnings.simplefilter('error', UserWarning)
print(image_dls(sys.argv[1], size=8, cache_dir=sys.argv[2], device='cpu').source.key)
'''


def test_two_processes_decode_the_same_folder_at_once(photos, tmp_path, load, fault):
    (tmp_path/'both.py').write_text(both)
    marks = [str(tmp_path/'m0'), str(tmp_path/'m1')]
    with ThreadPoolExecutor(2) as pool: done = [*pool.map(lambda m: run(tmp_path/'both.py', photos, tmp_path/'cache', *m), (marks, marks[::-1]))]
    assert [(o.returncode, o.stdout, o.stderr) for o in done] == [(0, f'{load(photos)[0].source.key}\n', '')]*2
    assert only_entry(tmp_path).name.startswith('images-')
    fault('folders', 'two processes that decode the same folder at once', nothing + 'both end with the same images')


# The command

commands = {
    's9_train on a folder with a truncated JPEG': (lambda d: [(d/'cat'/'9.jpg').write_bytes(as_bytes('jpeg', 60, 60)[:-900]), d][1], 'image file is truncated'),
    's9_train on a folder of one class': (lambda d: [shutil.rmtree(d/'cat'), d][1], 'one class, dog; at least two are needed'),
    's9_train on a folder with a loop of links': (lambda d: [(d/'cow').symlink_to('cow'), d][1], 'symbolic links'),
    's9_train on a class whose name has bytes that are no text': (lambda d: [make_odd((d/'cat').rename, d/os.fsdecode(b'\xff')), d][1], 'not UTF-8; rename it'),
    's9_train on a class without images whose name has a newline': (lambda d: [(d/'a\nb').mkdir(), d][1], '/a\\nb: no image in this folder'),
    's9_train on a table that is a pipe': (lambda d: [os.mkfifo(d/'t.csv'), d/'t.csv'][1], 't.csv: not a file or a folder, but a pipe or a device; give a folder or an archive of images, a table'),
    's9_train on a table with missing files': (lambda d: [(d/'t.csv').write_text(good + 'x.png,cat\n'), d/'t.csv'][1], 'x.png is not a file in'),
    's9_train on a table separated by semicolons': (lambda d: [(d/'t.csv').write_text(good.replace(',', ';')), d/'t.csv'][1], 'separate the cells by commas'),
    's9_train on a missing table': (lambda d: d/'gone.csv', 'gone.csv: no such file or folder'),
}


@posix
@pytest.mark.parametrize('what', commands)
def test_the_command(photos, tmp_path, home, fault, monkeypatch, capsys, what):  # noqa: F811
    make, msg = commands[what]
    path = make(photos)
    before = snapshot(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['s9_train', '--data', str(path), '--size', '32', '--out', str(tmp_path/'run')])
    with pytest.raises(SystemExit) as e: main_train()
    out, err = capsys.readouterr()
    assert (e.value.code, out, err.count('\n')) == (2, '', 1), err
    assert err.startswith('s9_train: ') and err.endswith(' (see s9_train --help)\n') and err[:-1].isprintable() and msg in err
    after = {k: v for k, v in snapshot(tmp_path).items() if not str(k).startswith(str(tmp_path/'home'))}
    assert after == {k: v for k, v in before.items() if not str(k).startswith(str(tmp_path/'home'))}  # no folder of a run either
    fault('folders', what, err)


# Workers, processes and kills

@pytest.fixture
def started_by(request):
    "The start method of worker processes, for one test"
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    if request.param == 'forkserver': multiprocessing.set_forkserver_preload(['s9_fastai.data.loaders', 'fastai.vision.augment'])  # its workers start at once
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def first_batches(dls): return [o.as_subclass(torch.Tensor) for _, b in zip(range(2), dls.train) for o in b]


@pytest.mark.parametrize('augment', ['item', 'batch'])
@pytest.mark.parametrize('started_by', [pytest.param(o, marks=pytest.mark.slow if o == 'spawn' else ()) for o in multiprocessing.get_all_start_methods()], indirect=True)
def test_workers_of_each_start_method_give_the_same_batches(photos, load, started_by, augment):
    none, two = (first_batches(load(photos, size=16, bs=2, augment=augment, num_workers=w)[0]) for w in (0, 2))
    assert len(none) == 4 and all(a.equal(b) for a, b in zip(none, two, strict=True))


many = '--epochs', 3, '--bs', 4, '--n-channels', 4, '--compute', 'plain', '--size', 32, '--save-every', 2, '--seed', 1


def alone(path, *args):
    "As `run`, in a process that begins with nothing, whose workers are forked as in a shell"
    return subprocess.run([sys.executable, path, *map(str, args)], capture_output=True, text=True, timeout=200)


def train_killed(folder, *args, kills=(), start=run):
    """The bytes of the weights of a run with the options `args`, and a hash of weights, history and log; it ends itself with SIGKILL
    at `kills`: what is done to a checkpoint, as in kill.KINDS, and the number of the checkpoint, counted from each start"""
    (script := folder.parent/'trap.py').write_text(kill.TRAP)
    command = args
    for kind, n in kills:
        done = start(script, kind, n, *command, '--out' if command is args else '--resume', folder)
        assert done.returncode == -signal.SIGKILL, done.stderr
        command = ()
    done = start(quick_train, *command, '--out' if command is args else '--resume', folder)
    assert done.returncode == 0, done.stderr
    return (folder/'weights.safetensors').read_bytes(), kill.fingerprint(folder)


@pytest.fixture
def pictures(photos):
    "16 images of each of two classes: 6 batches an epoch, with checkpoints in their midst"
    for c in ('cat', 'dog'):
        for i in range(4, 16): save(photos/c/f'{i}.png')
    return photos


@posix
def test_a_run_that_is_killed_twice(pictures, tmp_path, home):  # noqa: F811
    "In the midst of the first and of the second epoch"
    args = '--data', pictures, *many
    whole = train_killed(tmp_path/'whole', *args)
    assert train_killed(tmp_path/'killed', *args, kills=[('after the rename', 0), ('after the rename', 3)]) == whole


@posix
@pytest.mark.slow
@pytest.mark.parametrize('augment', ['item', 'batch'])
def test_killed_twice_with_and_without_workers(pictures, tmp_path, home, augment):  # noqa: F811
    args = '--data', pictures, *many, '--augment', augment
    whole = train_killed(tmp_path/'whole', *args, start=alone)
    for workers in (0, 2):
        assert train_killed(tmp_path/f'whole {workers}', *args, '--workers', workers, start=alone) == whole
        assert train_killed(tmp_path/f'killed {workers}', *args, '--workers', workers, kills=[('after the rename', 1), ('after the rename', 4)], start=alone) == whole
