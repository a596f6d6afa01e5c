"Trainings on several processes, by torchrun as from a shell: their processes by rank, their output, their weights"
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import decoded
from safetensors.numpy import load_file

torchrun = Path(sys.executable).with_name('torchrun')
train = Path(__file__).with_name('train_without_pictures.py')
tiny = '--data sample --n-channels 4 --bs 250 --threads 1'.split()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def environ(pid):
    "The environment of a process; empty for one that is gone"
    try: data = Path(f'/proc/{pid}/environ').read_bytes()
    except OSError: return {}
    return dict(o.split('=', 1) for o in data.decode(errors='replace').split('\0') if '=' in o)


class Launch:
    "torchrun with `args`, started by `prefix`, in a group of its own"
    def __init__(self, folder, *args, prefix=(), **env):
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err, self.begun = folder/'out', folder/'err', time.monotonic()
        with open(self.out, 'w') as out, open(self.err, 'w') as err:
            self.p = subprocess.Popen([*prefix, torchrun, *map(str, args)], stdout=out, stderr=err, start_new_session=True, env={**os.environ, **decoded.variable(args), **env})

    def __enter__(self): return self

    def __exit__(self, *_):
        for pid in (self.p.pid, *self.children()):  # workers have groups of their own
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        self.p.wait()

    @property
    def text(self): return self.out.read_text() + self.err.read_text()

    def children(self):
        "Processes that this launcher, or what it has replaced, has started"
        found = (o.split('/')[-2] for o in map(str, Path('/proc').glob('[0-9]*/stat')))
        return [int(o) for o in found if parent(o) == self.p.pid]

    def pid(self, rank):
        "The process of a rank"
        return next(o for o in self.children() if environ(o).get('RANK') == str(rank))

    def wait_for(self, text, seconds=120):
        "Until the output has `text`"
        until = time.monotonic() + seconds
        while text not in self.text:
            assert self.p.poll() is None, self.text
            assert time.monotonic() < until, f'no {text!r} in {self.text}'
            time.sleep(0.02)

    def end(self, seconds=120):
        "The exit code; an error if it takes longer than `seconds`"
        self.begun = time.monotonic()
        code = self.p.wait(seconds)
        self.took = time.monotonic() - self.begun
        return code

    def lines(self):
        "The lines on the standard error that are from the package"
        found = re.findall(r'^.*(?:s9_train|train_without_pictures|--resume).*$', self.err.read_text(), re.M)
        return [o for o in found if not re.search(r'FAILED|Root Cause|=====|deprecated|elastic', o)]

    def command(self):
        "The arguments of the command that resumes, as printed in the last line that has one"
        line = [o for o in self.text.splitlines() if '--resume' in o][-1]
        return shlex.split(line[line.index('torchrun '):])[1:]


def parent(pid):
    try: return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])
    except OSError: return None


def as_script(args):
    "The arguments of torchrun with the command as a script that draws no pictures"
    i = args.index('-m')
    return [*args[:i], train, *args[i+2:]]


def same_weights(a, b):
    "Are the weights of two run folders equal to the bit?"
    a, b = (load_file(Path(o)/'weights.safetensors') for o in (a, b))
    return a.keys() == b.keys() and all((a[k].tobytes() == b[k].tobytes()) for k in a)
