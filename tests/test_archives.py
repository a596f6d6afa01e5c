"Archives of images as a data set, with the faults of archives from outside; and images that do not fit on the disk"
import io
import shutil
import stat
import sys
import tarfile
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cifar import home  # noqa: F401, a fixture
from test_images import as_bytes, load, photos, posix, save, started_by  # noqa: F401, fixtures

import s9_fastai.app.training  # noqa: F401, its libraries warn when they are first imported
from s9_fastai.app.train import main_train
from s9_fastai.data.stored import FileImages
from s9_fastai.data.unpack import unpacked

forms = ['zip', 'tar', 'gztar', 'bztar', 'xztar']
image = as_bytes('png', 12, 10)


def packed(tmp_path, form='zip', root='photos'):
    "The archive of a folder"
    return shutil.make_archive(tmp_path/'own', form, tmp_path/root)


def batches(dl): return [o.as_subclass(torch.Tensor) for b in dl for o in b]


@pytest.mark.parametrize('form', forms)
def test_an_archive_gives_the_batches_of_its_folder(photos, tmp_path, load, form):  # noqa: F811
    (photos/'cat'/'.hidden.png').write_bytes(b'')
    folder, archive = (load(o)[0] for o in (photos, packed(tmp_path, form)))
    assert archive.source.key == folder.source.key and archive.source.path.startswith(str(tmp_path/'own'))
    assert all(map(torch.equal, batches(archive.train), batches(folder.train)))


def test_it_is_unpacked_once_and_again_after_a_change(photos, tmp_path):  # noqa: F811
    path, cache = packed(tmp_path), tmp_path/'cache'
    first = unpacked(path, cache)
    assert unpacked(path, cache) == first
    save(photos/'cat'/'9.png')
    second = unpacked(packed(tmp_path), cache)
    assert (second/'cat'/'9.png').is_file() and not first.exists()


@pytest.mark.parametrize('change', ['a file less', 'a file cut short', 'no record', 'no folder'])
def test_a_damaged_entry_is_made_again(photos, tmp_path, change):  # noqa: F811
    path, cache = packed(tmp_path), tmp_path/'cache'
    root = unpacked(path, cache)
    if change == 'a file less': (root/'cat'/'0.png').unlink()
    if change == 'a file cut short': (root/'cat'/'0.png').write_bytes(b'')
    if change == 'no record': (root.parent/'meta.json').unlink()
    if change == 'no folder': shutil.rmtree(root)
    with pytest.warns(UserWarning, match='the cache is damaged .* it is made again from .*own.zip'): again = unpacked(path, cache)
    assert (again/'cat'/'0.png').read_bytes() == (photos/'cat'/'0.png').read_bytes()


def test_a_table_in_an_archive(photos, tmp_path, load):  # noqa: F811
    rows = [f'{c}/{i}.png,{c}' for c in ('cat', 'dog') for i in range(4)]
    (photos/'labels.csv').write_text('\n'.join(['file,label', *rows]))
    dls, _ = load(packed(tmp_path))
    assert [*dls.vocab] == ['cat', 'dog'] and dls.source.report.items.left_out == ()


# --- what is refused

def zipped(tmp_path, *members):
    "A zip file of `members`: names, or `ZipInfo`s"
    with zipfile.ZipFile(tmp_path/'own.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for m in members: z.writestr(m, image)
    return tmp_path/'own.zip'


def tarred(tmp_path, **fields):
    "A tar archive of one member with these fields"
    m = tarfile.TarInfo('cat/1.png')
    for k, v in fields.items(): setattr(m, k, v)
    with tarfile.open(tmp_path/'own.tar', 'w') as t: t.addfile(m, io.BytesIO(image) if m.isfile() else None)
    return tmp_path/'own.tar'


def link():
    m = zipfile.ZipInfo('cat/1.png')
    m.external_attr = (stat.S_IFLNK | 0o777) << 16
    return m


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])
    return path


def locked(path):
    "A zip file whose members are marked as encrypted, in their own headers and in the list"
    data = bytearray(path.read_bytes())
    for sign, at in ((b'PK\3\4', 6), (b'PK\1\2', 8)): data[data.index(sign) + at] |= 1
    path.write_bytes(data)
    return path


def bomb(tmp_path):
    with zipfile.ZipFile(tmp_path/'own.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('cat/1.png', 'w', force_zip64=True) as f:
            for _ in range(257): f.write(bytes(2**20))
    return tmp_path/'own.zip'


faults = {
    'a name above its folder': (lambda d: zipped(d, '../evil.png'), "member '../evil.png' is refused (it points out of the archive)"),
    'an absolute name': (lambda d: zipped(d, '/evil.png'), 'is refused (it points out of the archive)'),
    'a drive of Windows': (lambda d: zipped(d, 'C:evil.png'), 'is refused (it points out of the archive)'),
    'a link in a zip file': (lambda d: zipped(d, link()), 'is refused (a link or a device)'),
    'a link in a tar archive': (lambda d: tarred(d, type=tarfile.SYMTYPE, linkname='/etc/passwd'), 'is refused (a link or a device)'),
    'a device': (lambda d: tarred(d, type=tarfile.CHRTYPE), 'is refused (a link or a device)'),
    'a name above its folder in a tar archive': (lambda d: tarred(d, name='../evil.png', size=len(image)), 'it points out of the archive'),
    'an encrypted file': (lambda d: locked(zipped(d, 'cat/1.png')), 'is refused (encrypted)'),
    'a file twice': (lambda d: zipped(d, 'cat/1.png', './cat/1.png'), './cat/1.png is there twice'),
    'a folder in the place of a file': (lambda d: zipped(d, 'cat.png', 'cat.png/1.png'), 'cat.png/1.png is there twice'),
    'no image': (lambda d: zipped(d, 'a.txt', 'b/c.docx'), 'no image or table in this archive'),
    'an empty archive': (lambda d: zipped(d), 'no image or table in this archive'),
    'a zip file cut short': (lambda d: cut(zipped(d, 'cat/1.png'), 60), 'not an archive, or damaged'),
    'a tar archive cut short': (lambda d: cut(tarred(d, size=len(image)), 700), 'not an archive, or damaged'),
    'no archive': (lambda d: [(d/'own.zip').write_bytes(b'no archive'*100), d/'own.zip'][1], 'not an archive, or damaged'),
    'an empty file': (lambda d: [(d/'own.zip').touch(), d/'own.zip'][1], 'not an archive, or damaged'),
    'gigabytes of zeros': (bomb, 'allowed are at most 268435456'),
    'loose images': (lambda d: zipped(d, '1.png', '2.png'), 'no folder of a class with images'),
    'one class': (lambda d: zipped(d, 'cat/1.png', 'cat/2.png'), 'one class, cat; at least two are needed'),
}


@pytest.mark.parametrize('what', [pytest.param(w, marks=posix) if 'link' in w or 'device' in w else w for w in faults])
def test_faults(tmp_path, load, what):  # noqa: F811
    make, message = faults[what]
    path = make(tmp_path)
    before = {p for p in tmp_path.rglob('*') if 'cache' not in p.parts}
    with pytest.raises((ValueError, OSError)) as e: load(path)
    text = str(e.value)
    assert message in text and '\n' not in text and str(path) in text or what in ('loose images', 'one class'), text
    assert {p for p in tmp_path.rglob('*') if 'cache' not in p.parts} == before
    if what not in ('loose images', 'one class'): assert not [*(tmp_path/'cache').glob('*')]  # nothing is left half unpacked


def test_bytes_that_do_not_fit_the_checksum(tmp_path, load):  # noqa: F811
    path = tmp_path/'own.zip'
    with zipfile.ZipFile(path, 'w') as z: z.writestr('cat/1.png', image)
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match='own.zip: not an archive, or damaged .*CRC'): load(path)


def test_the_remedy_of_a_refused_archive(tmp_path, photos, load):  # noqa: F811
    "Unpacked by hand, it is read"
    path = zipped(tmp_path, *(f'{c}/{i}.png' for c in ('cat', 'dog') for i in range(3)), '../evil.png')
    with pytest.raises(ValueError, match='unpack it and give the folder'): load(path)
    with zipfile.ZipFile(path) as z: z.extractall(tmp_path/'by hand')
    (tmp_path/'by hand'/'evil.png').unlink()
    assert len(load(tmp_path/'by hand')[0].train_ds) == 4


def test_the_command(photos, tmp_path, home, monkeypatch, capsys):  # noqa: F811
    for c in ('cat', 'dog'):
        for i in range(4, 8): save(photos/c/f'{i}.png')
    args = '--data', packed(tmp_path), '--size', 32, '--epochs', 1, '--bs', 4, '--n-channels', 4, '--out', tmp_path/'run'
    monkeypatch.setattr(sys, 'argv', ['s9_train', *map(str, args)])
    main_train()
    assert (tmp_path/'run'/'weights.safetensors').is_file() and len((tmp_path/'run'/'split.csv').read_text().splitlines()) == 17
    path = zipped(tmp_path, '../evil.png')
    monkeypatch.setattr(sys, 'argv', ['s9_train', '--data', str(path), '--size', '32', '--out', str(tmp_path/'other')])
    with pytest.raises(SystemExit) as e: main_train()
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('s9_train: ') == 1 and "member '../evil.png' is refused" in err and not (tmp_path/'other').exists()


# --- images that do not fit on the disk

@pytest.fixture
def full(monkeypatch):
    "A disk with a kilobyte left"
    import s9_fastai.data.decode as decode
    monkeypatch.setattr(decode.shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))


@pytest.mark.parametrize('augment', ['item', 'batch'])
def test_without_room_the_batches_are_the_same(photos, tmp_path, load, full, augment, monkeypatch):  # noqa: F811
    plain, texts = load(photos, augment=augment)
    assert isinstance(plain.train_ds.tls[0].tfms.fs[0].parts[0].images, FileImages)
    [text] = [t for t in texts if 'are not stored' in t]
    assert '8 images of 8x8 pixels take 0.0 GB' in text and 'cache_dir' in text
    monkeypatch.undo()
    stored, texts = load(photos, augment=augment)  # the remedy: room
    assert not texts and isinstance(stored.train_ds.tls[0].tfms.fs[0].parts[0].images, np.memmap)
    assert plain.source.key == stored.source.key and plain.source.spec == stored.source.spec
    for a, b in zip((plain.train, plain.valid), (stored.train, stored.valid)): assert all(map(torch.equal, batches(a), batches(b)))


@pytest.mark.parametrize('started_by', ['fork', 'forkserver', pytest.param('spawn', marks=pytest.mark.slow)], indirect=True)
def test_workers_read_the_files(photos, load, full, started_by):  # noqa: F811
    none, two = (batches(load(photos, num_workers=w)[0].train) for w in (0, 2))
    assert all(map(torch.equal, none, two))


def test_a_file_that_changes_during_a_run_is_named(photos, load, full):  # noqa: F811
    dls, _ = load(photos)
    for f in (photos/'cat').iterdir(): save(f)
    with pytest.raises(ValueError, match='the image has changed since the loaders were made; restore it, or make them again'): batches(dls.train)
    again, _ = load(photos)  # the remedy
    assert len(batches(again.train)) == len(batches(load(photos)[0].train)) > 0
