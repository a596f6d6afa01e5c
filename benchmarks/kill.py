"Kills `s9_train` with SIGKILL at random moments, lets it go on, and compares what it leaves with a run that was never killed"
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from safetensors.torch import load_file

from common import facts, options, parse, save

# What a run may consist of: number format and layers, way of augmentation, workers
VARIANTS = (dict(compute='plain', augment='item', workers=0), dict(compute='plain', augment='batch', workers=2),
            dict(compute='fast', augment='batch', workers=0), dict(compute='plain', augment='item', workers=2))
KINDS = 'anywhere', 'in a write', 'before the rename', 'after the rename', 'between log and history'

# The command in a process that kills itself where a file is written: at the place called `kind`, the `n`-th time it passes
TRAP = '''
import os, signal, sys, pathlib
from s9_fastai.core import files, weights
from s9_fastai.training import record
kind, n, sys.argv = sys.argv[1], int(sys.argv[2]), ['s9_train', *sys.argv[3:]]
def die_at(moment):
    global n
    if moment == kind:
        n -= 1
        if n < 0: os.kill(os.getpid(), signal.SIGKILL)
is_ours = lambda path: str(path).endswith('.safetensors') and 'checkpoints' in str(path)
write, rename, append = pathlib.Path.write_bytes, os.replace, files.append_text
def write_bytes(self, data):
    if is_ours(self):
        write(self, data[:len(data)//2])
        die_at('in a write')
    return write(self, data)
def replace(src, dst):
    if is_ours(dst): die_at('before the rename')
    rename(src, dst)
    if is_ours(dst): die_at('after the rename')
def append_text(path, text):
    if str(path).endswith('history.csv'): die_at('between log and history')
    return append(path, text)
pathlib.Path.write_bytes, os.replace, record.append_text = write_bytes, replace, append_text
from s9_fastai.app.train import main_train
main_train()
'''


def arguments(variant, folder, epochs, bs):
    "The options of a run of `variant`"
    more = [str(o) for k, v in variant.items() for o in (f'--{k}', v)]
    return ['--data', 'sample', '--epochs', str(epochs), '--bs', str(bs), '--save-every', '3', '--out', str(folder), *more]


def command(*args): return [Path(sys.executable).with_name('s9_train'), *map(str, args)]


def fingerprint(folder):
    "A hash of weights, history (but for the time an epoch took) and log of the run in `folder`"
    h = hashlib.blake2b(digest_size=8)
    for k, v in sorted(load_file(folder/'weights.safetensors').items()): h.update(k.encode() + v.numpy().tobytes())
    h.update(pd.read_csv(folder/'history.csv', dtype=str).drop(columns='time').to_csv().encode())
    h.update((folder/'log.txt').read_bytes())
    return h.hexdigest()


def begin(args, folder):
    "A run's process, once its first checkpoint is there"
    p = subprocess.Popen(args, stdout=subprocess.DEVNULL)
    while not any(folder.glob('checkpoints/0*')) and p.poll() is None: time.sleep(0.005)
    return p


def whole_run(variant, folder, epochs, bs):
    "A run that nobody kills: its fingerprint, and the seconds from the first checkpoint to the end of the training"
    p = begin(command(*arguments(variant, folder, epochs, bs)), folder)
    start = time.monotonic()
    while not (folder/'weights.safetensors').exists() and p.poll() is None: time.sleep(0.005)
    seconds = time.monotonic() - start
    if p.wait(): raise RuntimeError(f'{p.args} has failed')
    return fingerprint(folder), seconds


def kill(variant, folder, epochs, bs, kind, seconds, rng):
    "Start a run and kill it; the moment, and whether it was killed at all"
    args = arguments(variant, folder, epochs, bs)
    if kind == 'anywhere':
        p = begin(command(*args), folder)
        time.sleep(moment := rng.uniform(0, seconds))
        p.send_signal(signal.SIGKILL)
        moment = f'{moment:.2f} s after the first checkpoint'
    else:
        n = rng.randrange(epochs if kind == 'between log and history' else 3*epochs)
        p = subprocess.Popen([sys.executable, '-c', TRAP, kind, str(n), *args], stdout=subprocess.DEVNULL)
        moment = f'{"epoch" if kind == "between log and history" else "checkpoint"} {n + 1}'
    return moment, p.wait() == -signal.SIGKILL


def go_on(folder):
    "Resume the run in `folder`; where it went on"
    done = subprocess.run(command('--resume', folder), capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f'{folder} does not go on: {done.stderr}')
    found = re.search('resuming from (.*)', done.stdout)
    return found[1] if found else 'nothing, it began anew'


def trial(i, variant, kind, tmp, epochs, bs, whole, seconds, rng):
    "Kill a run once and let it go on: a dict for the record"
    for attempt in range(9):
        folder = Path(tmp)/f'{i}-{attempt}'
        moment, killed = kill(variant, folder, epochs, bs, kind, seconds, rng)
        if killed: break
        seconds *= 0.8  # it had ended before: take an earlier moment
    else: raise RuntimeError(f'{kind}: the run always ended before it was killed')
    went_on = go_on(folder)
    return dict(kind=kind, moment=moment, went_on_from=went_on, **variant, same=fingerprint(folder) == whole)


def trials(n, epochs, bs, seed, variants=VARIANTS, jobs=2):
    "`n` trials, every kind and every variant in turn, `jobs` at a time"
    def run(i):
        v = i//len(KINDS) % len(variants)
        return trial(i, variants[v], KINDS[i % len(KINDS)], tmp, epochs, bs, *wholes[v], random.Random(f'{seed} {i}'))
    with TemporaryDirectory() as tmp, ThreadPoolExecutor(jobs) as pool:
        used = variants[:-(-n//len(KINDS))]
        wholes = list(pool.map(lambda i: whole_run(used[i], Path(tmp)/f'whole-{i}', epochs, bs), range(len(used))))
        yield from pool.map(run, range(n))


def main():
    p = options(__doc__, reps=20)
    p.add_argument('--epochs', type=int, default=3, help='epochs of a run')
    p.add_argument('--bs', type=int, default=200, help='images a batch, of 2,000')
    p.add_argument('--seed', type=int, default=0, help='of the random moments')
    args = parse(p)
    os.environ['OMP_NUM_THREADS'] = str(args.threads)
    results = []
    print('| killed | moment | went on from | compute | augment | workers | the same bits |', '|---|---|---|---|---|---|---|', sep='\n')
    for o in trials(args.reps, args.epochs, args.bs, args.seed):
        results.append(o)
        print('|', ' | '.join(map(str, {**o, 'same': 'yes' if o['same'] else 'NO'}.values())), '|', flush=True)
    n = sum(o['same'] for o in results)
    print(f'\n{n} of {len(results)} runs ended with the same weights, history and log')
    save([dict(what='killed and resumed', measure='same weights, history and log', n=len(results), same=n, values=results,
               settings=dict(epochs=args.epochs, bs=args.bs, seed=args.seed), **facts())], args.out)
    sys.exit(n < len(results))


if __name__ == '__main__': main()
