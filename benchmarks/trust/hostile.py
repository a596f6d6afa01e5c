"Makes files that would hang their reader or fill its memory, and reads each in a process of its own, with the time of the processor and the memory that it takes"
import bz2
import gzip
import json
import lzma
import os
import pickle
import resource
import signal
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fuzz import HISTORY, READERS, checkpoint_state, recipe, sound_file, write_net

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import facts, options, parse, save

from s9_fastai.cifar.facts import SPEC
from s9_fastai.core.weights import write_tensors
from s9_fastai.nets.net import Net
from s9_fastai.nets.saved import save_net
from s9_fastai.resume.state import write_state

LIMIT = 60  # Seconds after which a reader is killed; each is forked, so that it has all its imports


def pipe(path): os.mkfifo(path)
def zeros(path): path.symlink_to('/dev/zero')


def sparse(path, size, start=b'', end=b''):
    "A file of `size` bytes between `start` and `end`, of which none is on the disk"
    with open(path, 'wb') as f:
        f.write(start)
        f.truncate(len(start) + size)
        f.seek(0, 2)
        f.write(end)


def safetensors(header):
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text


def one_tensor(name, size): return safetensors({name: dict(dtype='U8', shape=[size], data_offsets=[0, size])})
def long_int(v): return b'\x8a\x10' + v.to_bytes(16, 'little')


# ---- pickles

COLLISIONS = b''.join(long_int(i*(2**61 - 1)) for i in range(50_000))
NESTED = b')q\0' + b''.join(b'h' + bytes([i]) + b'h' + bytes([i]) + b'\x86q' + bytes([i + 1]) for i in range(60))


def pickles(path, data): path.write_bytes(data)


# ---- archives


def member(**kw):
    m = tarfile.TarInfo('a')
    for k, v in kw.items(): setattr(m, k, v)
    return m.tobuf(tarfile.GNU_FORMAT)


def sparse_chain(n):
    "An old GNU header of a sparse file, and `n` blocks of its map"
    head = bytearray(member(type=tarfile.GNUTYPE_SPARSE))
    head[482] = 1
    head[148:156] = b' '*8
    head[148:156] = b'%06o\0 ' % sum(head)
    block = b'0'*11 + b'\0'
    return bytes(head) + (block*42 + b'\1' + bytes(7))*n


def pax(records, n):
    "`n` members with an extended header of `records`"
    body = records + bytes(-len(records) % 512)
    m = tarfile.TarInfo('a')
    m.type, m.size = tarfile.XHDTYPE, len(records)
    return (m.tobuf(tarfile.USTAR_FORMAT) + body + member())*n


def records(n): return b''.join(b'9 %03x=a\n' % (i % 4096) for i in range(n))


def archive(path, data, pack=lambda data: gzip.compress(data, 1)): path.write_bytes(pack(member() + data))


def xz(data): return lzma.compress(data, filters=[dict(id=lzma.FILTER_LZMA2, dict_size=3*2**29)])


def zip_file(path, *members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for nm, data in members: z.writestr(nm, data)


class Bytes:
    "Pickles to `bytearray(n)`"
    def __init__(self, n): self.n = n
    def __reduce__(self): return bytearray, (self.n,)


# ---- weights and checkpoints


def nan_weights(path, value):
    net = Net(4)
    torch.nn.init.constant_(net.conv1.conv.weight, value)
    save_net(net, path, dict(n_channels=4), SPEC)


def weights_for(path, size=32, **kw):
    write_net(path)
    about = dict(architecture=json.dumps(dict(n_channels=4, **kw)), **{**SPEC.header(), 'size': str(size)})
    write_tensors(path, Net(4).state_dict(), **about)


def forged(path, v):
    state = checkpoint_state()
    state['learner']['loss'] = v
    write_state(path, state)


# ---- images


def big_png(path, w, h, colour):
    "A PNG file of `w` times `h` black pixels"
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    pack, n = zlib.compressobj(1), 4 if colour == 6 else 3
    rows = b''.join(pack.compress(bytes(1 + n*w)) for _ in range(h)) + pack.flush()
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, colour, 0, 0, 0)) + chunk(b'IDAT', rows) + chunk(b'IEND', b''))


def big_header_png(path): path.write_bytes(b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + b'IHDR' + struct.pack('>IIBBBBB', 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0) + bytes(4))


#: What the file is -> its reader, and a function that makes it
FILES = {
    **{f'a pipe as {nm}': (nm, pipe) for nm in ('pickle', 'tar', 'image', 'original', 'weights', 'teacher', 'checkpoint', 'history', 'cache')},
    **{f'a link to /dev/zero as {nm}': (nm, zeros) for nm in ('tar', 'image', 'weights', 'teacher', 'checkpoint', 'history', 'recipe', 'cache', 'array')},
    'pickle: bytearray(10**10)': ('pickle', lambda p: pickles(p, pickle.dumps(Bytes(10**10), 2))),
    'pickle: LONG_BINPUT 2**31 - 1': ('pickle', lambda p: pickles(p, b'Nr\xff\xff\xff\x7f.')),
    'pickle: a set of 50,000 numbers of one hash': ('pickle', lambda p: pickles(p, b'\x80\x04\x8f(' + COLLISIONS + b'\x90.')),
    'pickle: 25,000 keys of one hash': ('pickle', lambda p: pickles(p, b'\x80\x02}(' + COLLISIONS + b'u.')),
    'pickle: a key of 2**60 tuples': ('pickle', lambda p: pickles(p, b'\x80\x02}' + NESTED + b'Ns.')),
    'pickle: 64 MB of instructions': ('pickle', lambda p: pickles(p, b'N'*2**26)),
    'tar: a sparse file with a map of 1 GB': ('tar', lambda p: archive(p, sparse_chain(2**21))),
    'tar: 1,000,000 members': ('tar', lambda p: archive(p, member()*10**6)),
    'tar: 69,990 members': ('tar', lambda p: archive(p, member()*69_989)),
    'tar: a member of 2 GB': ('tar', lambda p: archive(p, member(size=2**31) + bytes(2**20))),
    'tar: 0.4 GB of zeros in gzip': ('tar', lambda p: archive(p, member(size=3*2**27 - 2**20) + bytes(2**30))),
    'tar: 0.4 GB of zeros in bzip2': ('tar', lambda p: archive(p, member(size=3*2**27 - 2**20) + bytes(2**30), bz2.compress)),
    'tar: 2 GB after the end': ('tar', lambda p: archive(p, bytes(2**31))),
    'tar: xz with 1.5 GB of dictionary': ('tar', lambda p: archive(p, bytes(2**20), xz)),
    'tar: 1.8 million extended attributes': ('tar', lambda p: archive(p, pax(records(7200), 256))),
    'original: 2 GB in a zip of 10 MB': ('original', lambda p: zip_file(p, ('a/data.pkl', bytes(2**31 - 2**20)))),
    'original: bytearray(10**10)': ('original', lambda p: zip_file(p, ('a/data.pkl', pickle.dumps(Bytes(10**10), 2)))),
    'original: 65,000 members': ('original', lambda p: zip_file(p, *((f'{i:0200}', b'') for i in range(65_000)))),
    'weights: a tensor of 8 GB of zeros': ('weights', lambda p: sparse(p, 2**33, one_tensor('conv1.conv.weight', 2**33))),
    'net: a tensor of 8 GB of zeros': ('net', lambda p: sparse(p, 2**33, one_tensor('fc.weight', 2**33))),
    'teacher: logits of 8 GB of zeros': ('teacher', lambda p: sparse(p, 2**33, one_tensor('logits', 2**33))),
    'checkpoint: a tensor of 8 GB of zeros': ('checkpoint', lambda p: sparse(p, 2**33, one_tensor('json', 2**33))),
    'weights: 1,000,000 empty tensors': ('weights', lambda p: p.write_bytes(safetensors({str(i): dict(dtype='U8', shape=[0], data_offsets=[0, 0]) for i in range(10**6)}))),
    'checkpoint: 200,000 empty tensors': ('checkpoint', lambda p: p.write_bytes(safetensors({str(i): dict(dtype='U8', shape=[0], data_offsets=[0, 0]) for i in range(200_000)}))),
    'checkpoint: 60,000 empty tensors': ('checkpoint', lambda p: p.write_bytes(safetensors({str(i): dict(dtype='U8', shape=[0], data_offsets=[0, 0]) for i in range(60_000)}))),
    'weights: a header of 4 MB of lists': ('weights', lambda p: p.write_bytes(safetensors([[]]*(2**20 - 9)))),
    'net: a million million classes': ('net', lambda p: weights_for(p, n_classes=10**12)),
    'net: images of 10**6 pixels': ('net', lambda p: weights_for(p, size=10**6)),
    'net: NaN weights': ('net', lambda p: nan_weights(p, float('nan'))),
    'net: infinite weights': ('net', lambda p: nan_weights(p, float('inf'))),
    'net: weights of 3e38': ('net', lambda p: nan_weights(p, 3e38)),
    'checkpoint: a loss of whole numbers': ('checkpoint', lambda p: forged(p, torch.tensor(3))),
    'checkpoint: a complex loss': ('checkpoint', lambda p: forged(p, torch.tensor(3j))),
    'history: a line of 300 MB': ('history', lambda p: sparse(p, 3*10**8, HISTORY.encode())),
    'history: 10,000 columns, a million lines': ('history', lambda p: p.write_bytes(b','*10_000 + b'\n1'*10**6)),
    'recipe: 300 MB': ('recipe', lambda p: sparse(p, 3*10**8, json.dumps(recipe()).encode())),
    'cache: meta.json of nested lists': ('cache', lambda p: p.write_bytes(b'['*10**6)),
    'array: 8 GB of zeros': ('array', lambda p: sparse(p, 2**33, p.read_bytes()[:128])),
    'png: 4 * 10**18 pixels': ('image', big_header_png),
    'png: 89 million pixels': ('image', lambda p: big_png(p, 9450, 9450, 2)),
    'png: 89 million transparent pixels': ('image', lambda p: big_png(p, 9450, 9450, 6)),
}

# ---- a process of its own


def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)  # MB


def child(reader, path, out):
    "Read `path` and write to `out` what came of it, as JSON"
    signal.alarm(LIMIT)
    warnings.simplefilter('ignore')
    before, start, cpu = memory(), time.monotonic(), time.process_time()
    try: message = f'read: {type(READERS[reader](path)).__name__}'
    except Exception as e: message = f'{type(e).__name__}: {e}' if '\n' not in str(e) else f'{type(e).__name__} OF MORE THAN ONE LINE'
    out.write_text(json.dumps(dict(seconds=round(time.process_time() - cpu, 2), wall=round(time.monotonic() - start, 2), mb=round(memory() - before), message=message)))


def measure(what, folder):
    "Make the file `what` in `folder` and read it in another process: a row of the results"
    reader, make = FILES[what]
    path, out = sound_file(reader, folder), Path(folder)/'out'
    if what != 'array: 8 GB of zeros': path.unlink()
    make(path)
    size = path.stat().st_size if path.is_file() else 0
    if not (pid := os.fork()):
        try: child(reader, path, out)
        finally: os._exit(0)
    _, status = os.waitpid(pid, 0)
    row = json.loads(out.read_text()) if out.exists() else dict(seconds=LIMIT, wall=LIMIT, mb=None, message=f'KILLED, status {status}')
    return dict(file=what, reader=reader, size=size, **{**row, 'message': row['message'].replace(folder, '…')})


def main():
    p = options(__doc__)
    p.add_argument('--only', default='', help='files with this text in their names; default: all')
    args = parse(p)
    rows = []
    print('| file | reader | bytes | s of the processor | s | MB | message |', '|---|---|---|---|---|---|---|', sep='\n')
    for what in FILES:
        if args.only not in what: continue
        with TemporaryDirectory() as tmp: o = measure(what, tmp)
        rows.append(o)
        print('|', ' | '.join(map(str, o.values())), '|', flush=True)
    bad = [o for o in rows if not o['message'].isprintable() or o['mb'] is None or o['seconds'] > 10 or o['mb'] > 1000]
    print(f'\n{len(rows) - len(bad)} of {len(rows)} files take at most 10 s of the processor and 1 GB')
    save([dict(what='hostile files', measure='time and memory of their readers', n=len(rows), values=rows, **facts())], args.out)
    sys.exit(len(bad) > 0)


if __name__ == '__main__': main()
