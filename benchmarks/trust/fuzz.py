"Changes bytes of a sound file for some time and reads it: nothing but an error of one line, or the content, may come of it"
import gzip
import json
import pickle
import random
import sys
import tarfile
import time
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import facts, options, parse, save

from s9_fastai.app.run import open_run
from s9_fastai.cifar.archives import archive_files
from s9_fastai.cifar.cache import open_cache, write_cache
from s9_fastai.cifar.facts import BATCHES, CLASSES, SPEC, Split
from s9_fastai.cifar.layouts import file_bytes
from s9_fastai.cifar.pickles import read_batch
from s9_fastai.cifar.png import decode_png
from s9_fastai.core.files import read_input
from s9_fastai.core.weights import load_weights, read_tensors, write_tensors
from s9_fastai.data.images import open_image
from s9_fastai.nets.net import Net
from s9_fastai.nets.original import _original_keys, load_original
from s9_fastai.nets.saved import load_net, save_net
from s9_fastai.report.plots import read_history
from s9_fastai.resume.saved import read_checkpoint
from s9_fastai.resume.state import write_state
from s9_fastai.training.distill import TeacherLogits

# ---- sound files, each by a function of its path


def arrays(n=20): return Split(np.arange(n*3072, dtype=np.uint8).reshape(n, 32, 32, 3), np.arange(n) % 10)


def png_bytes():
    f = BytesIO()
    Image.fromarray(arrays().images[0]).save(f, 'png')
    return f.getvalue()


def batch_bytes(protocol=2):
    x, y = arrays()
    return pickle.dumps({'data': x.transpose(0, 3, 1, 2).reshape(-1, 3072), 'labels': y.tolist(), 'filenames': ['a.png']*len(y)}, protocol)


def tar_bytes():
    f, data = BytesIO(), png_bytes()
    with tarfile.open(fileobj=f, mode='w') as tf:
        for i in range(20):
            m = tarfile.TarInfo(f'cifar10/{("train", "test")[i % 2]}/{CLASSES[i//2]}/{i}_{CLASSES[i//2]}.png')
            m.size = len(data)
            tf.addfile(m, BytesIO(data))
    return f.getvalue()


def write_net(path): save_net(Net(4), path, dict(n_channels=4), SPEC)


def write_original(path): torch.save({k: t for nm, t in Net(4).state_dict().items() for k in _original_keys(nm)}, path)


def checkpoint_state():
    return dict(callbacks=[], changed={}, csv=[], done=False, fits=[dict(n_epoch=3, lr=[.1], wd=[.1])], frozen=dict(idx=0, trained=[True]), grads=[None],
                learner=dict(iter=1, loss=torch.tensor(1.), smooth_loss=torch.tensor(1.)), loaders=[], lost=[], metrics=[], model=dict(w=torch.ones(3)),
                opt=dict(state=[dict(a=torch.ones(3))], hypers=[dict(lr=.1)]), place=(1, 'train', 2), random=dict(numpy=('MT19937', torch.ones(9), 3)), time=1.5)


def recipe():
    from dataclasses import asdict

    from s9_fastai.app.recipe import get_recipe
    from s9_fastai.app.run import RunOptions
    return {**asdict(RunOptions()), **asdict(get_recipe('fast')), 'data': 'sample', 'data_key': 'a'}


HISTORY = 'epoch,train_loss,valid_loss,train_accuracy,valid_accuracy,lr,time\n' + ''.join(f'{i},1.5,1.4,0.4,0.5,0.05,00:21\n' for i in range(1, 9))
SOUND = {
    'pickle': lambda p: p.write_bytes(batch_bytes()), 'tar': lambda p: p.write_bytes(tar_bytes()), 'tgz': lambda p: p.write_bytes(gzip.compress(tar_bytes(), 1)),
    'png': lambda p: p.write_bytes(png_bytes()), 'image': lambda p: p.write_bytes(png_bytes()), 'original': write_original,
    'weights': write_net, 'net': write_net, 'teacher': lambda p: TeacherLogits(torch.rand(20, 10), data_key='a').save(p),
    'checkpoint': lambda p: write_state(p, checkpoint_state()), 'history': lambda p: p.write_text(HISTORY), 'recipe': lambda p: p.write_text(json.dumps(recipe(), indent=2)),
    'cache': lambda p: write_cache((arrays(), arrays()), p.parent) or None, 'array': lambda p: write_cache((arrays(), arrays()), p.parent) or None}

# ---- readers, and the name of the file that each reads

READERS = {
    'pickle': lambda p: read_batch(file_bytes(('data_batch_1',), str(p)), 'data_batch_1'), 'tar': archive_files, 'tgz': archive_files, 'png': lambda p: decode_png(read_input(p, 2**16), p),
    'image': open_image, 'original': lambda p: load_original(Net(4), p), 'weights': lambda p: load_weights(Net(4), p), 'net': load_net, 'teacher': TeacherLogits.load,
    'checkpoint': read_checkpoint, 'history': read_history, 'recipe': lambda p: open_run(p.parent), 'cache': lambda p: open_cache(p.parent, 'here'), 'array': lambda p: open_cache(p.parent, 'here')}
NAMES = {'recipe': 'recipe.json', 'cache': 'meta.json', 'array': 'test_labels.npy', 'pickle': BATCHES[0]}

# ---- changes


def changed(data, rng):
    "`data` after one to three accidents"
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i, n = rng.randrange(len(data) + 1), rng.randint(1, 64)
        if rng.random() < .5: i = min(i, rng.randrange(400))  # where a header is
        kind = rng.choice(['flip', 'cut', 'insert', 'zero', 'repeat', 'remove', 'digit'])
        if kind == 'flip' and i < len(data): data[i] ^= 1 << rng.randrange(8)
        elif kind == 'cut': del data[i:]
        elif kind == 'insert': data[i:i] = rng.choice([rng.randbytes(n), b'9'*n, b'\xff'*8, b'-1', b'NaN', b'1e999', b'[', b'{"', b','])
        elif kind == 'zero': data[i:i + n] = bytes(len(data[i:i + n]))
        elif kind == 'repeat': data[i:i] = data[i:i + n]*rng.randint(1, 9)
        elif kind == 'digit': data[i:i + 1] = rng.choice([b'0', b'9', b'"', b':'])
        else: del data[i:i + n]
    return bytes(data)


def right_png(data):
    "`data` with the right checksum for each chunk, so that a change comes through to the decoder"
    data, i = bytearray(data), 8
    while i + 12 <= len(data):
        n = int.from_bytes(data[i:i+4], 'big')
        if i + 12 + n > len(data): break
        data[i+8+n:i+12+n] = zlib.crc32(data[i+4:i+8+n]).to_bytes(4, 'big')
        i += 12 + n
    return bytes(data)


def right_tar(data):
    "`data` with the right checksum in each block that looks like a header"
    data = bytearray(data)
    for i in range(0, len(data) - 511, 512):
        if data[i+257:i+262] == b'ustar':
            data[i+148:i+156] = b' '*8
            data[i+148:i+156] = b'%06o\0 ' % sum(data[i:i+512])
    return bytes(data)


def right_checkpoint(path, rng):
    "The file `path` with other JSON and the right checksum"
    tensors, _ = read_tensors(path)
    text = changed(tensors['json'].numpy().tobytes(), rng)
    write_tensors(path, {**tensors, 'json': torch.frombuffer(bytearray(text or b' '), dtype=torch.uint8)})


REPAIRS = {'png': right_png, 'image': right_png, 'tar': right_tar, 'tgz': lambda data: gzip.compress(right_tar(data), 1)}


def change(name, path, sound, rng):
    "Write another file to `path`; half of them with right checksums, where the format has some"
    path.write_bytes(sound)
    if rng.random() < .5: return path.write_bytes(changed(sound, rng))
    if name == 'checkpoint': return right_checkpoint(path, rng)
    if name == 'tgz': sound = gzip.decompress(sound)
    path.write_bytes(REPAIRS.get(name, bytes)(changed(sound, rng)))


# ---- one reader


def sound_file(name, folder):
    "A sound file for the reader `name` below `folder`"
    path = Path(folder)/name/NAMES.get(name, 'file')
    if name in ('cache', 'array'): path.parent.parent.mkdir(parents=True, exist_ok=True)
    else: path.parent.mkdir(parents=True, exist_ok=True)
    SOUND[name](path)
    return path


def fault(e):
    "What is wrong with the error `e`; None for one of one line that names a file"
    if type(e).__name__ in ('UnicodeDecodeError', 'JSONDecodeError') or not isinstance(e, (ValueError, OSError)): return f'{type(e).__name__}: {e}'
    text = str(e)
    if not text.isprintable() or ': ' not in text or len(text) > 2000: return f'{type(e).__name__}: {text[:500]!r}'


def fuzz(name, folder, seed=0, seconds=None, count=None):
    "Numbers of files that were read and refused by the reader `name` in `seconds`, or of `count` files, and the faults"
    path = sound_file(name, folder)
    sound, read = path.read_bytes(), READERS[name]
    read(path)
    done, faults, longest, start, rng = dict(read=0, refused=0), [], 0, time.monotonic(), random.Random(f'{seed} {name}')
    while (time.monotonic() - start < seconds) if count is None else sum(done.values()) < count:
        change(name, path, sound, rng)
        begun = time.monotonic()
        try:
            read(path)
            done['read'] += 1
        except Exception as e:
            done['refused'] += 1
            if bad := fault(e): faults.append((bad, path.read_bytes()))
        longest = max(longest, time.monotonic() - begun)
    return dict(**done, faults=faults, longest=round(longest, 2))


def main():
    p = options(__doc__)
    p.add_argument('--seconds', type=float, default=60, help='for each reader')
    p.add_argument('--reader', nargs='+', choices=READERS, default=[*READERS], metavar='NAME', help=f'readers: {", ".join(READERS)}')
    p.add_argument('--seed', type=int, default=int(time.time()), help='of the changes; default: the time')
    p.add_argument('--keep', type=Path, help='folder for files that were a fault')
    args = parse(p)
    warnings.simplefilter('ignore')
    rows, bad = [], 0
    print('| reader | files | read | refused | faults | longest, s |', '|---|---|---|---|---|---|', sep='\n')
    with TemporaryDirectory() as tmp:
        for name in args.reader:
            o = fuzz(name, tmp, args.seed, args.seconds)
            n, faults = o['read'] + o['refused'], o.pop('faults')
            bad += len(faults)
            print(f'| {name} | {n:,} | {o["read"]:,} | {o["refused"]:,} | {len(faults)} | {o["longest"]} |', flush=True)
            for i, (text, data) in enumerate(faults):
                print(text[:300], file=sys.stderr)
                if args.keep: args.keep.mkdir(parents=True, exist_ok=True), (args.keep/f'{name}-{i}').write_bytes(data)
            rows.append(dict(what=name, measure='files of changed bytes', n=n, faults=len(faults), **o, settings=dict(seconds=args.seconds, seed=args.seed), **facts()))
    save(rows, args.out)
    sys.exit(bad > 0)


if __name__ == '__main__': main()
