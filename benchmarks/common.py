"What the measuring scripts share: options, data, contestants that take turns, JSON lines and tables"
import argparse
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import sleep

import cv2
import numpy as np
import torch
from PIL import Image

from s9_fastai.cifar.facts import CLASSES
from s9_fastai.cifar.download import fastai_dir
from s9_fastai.cifar.load import load_cifar
from s9_fastai.app.command import complain
from s9_fastai.core.environment import environment

here = Path(__file__).resolve().parent


@cache
def busy_cores():
    "Cores that are busy before a script begins, measured for a second; None where there is no /proc/stat"
    def ticks(): return [int(v) for v in Path('/proc/stat').read_text().split(maxsplit=9)[1:9]]
    try:
        before = ticks()
        sleep(1)
        spent = [b - a for a, b in zip(before, ticks())]
    except OSError: return None
    idle = spent[3] + spent[4]  # waiting for a disk is idle too
    return round(os.cpu_count()*(1 - idle/max(sum(spent), 1)), 2)


def options(doc, reps=None):
    "An argparse parser with the options that every script has; without `reps` nothing is repeated"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.error = partial(complain, p.prog)
    if reps: p.add_argument('--reps', type=int, default=reps, help='repetitions that count, after one that does not')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch in each process')
    p.add_argument('--out', type=Path, default=here/'results', help='folder of the JSON lines')
    return p


def data_options(p, names):
    "The options of scripts that read images; `names` are the contestants"
    p.add_argument('--data', default=os.environ.get('S9_CIFAR10'), help="the full CIFAR-10, or 'sample' to try out")
    p.add_argument('--contestants', nargs='+', choices=names, default=names, metavar='NAME',
                   help=f'who takes part: {", ".join(names)}')
    return p


def parse(p):
    "The options as given; one line and exit code 2 where they cannot be used"
    args = p.parse_args()
    if 'reps' in args and args.reps < 1: p.error(f'--reps is {args.reps}, but must be at least 1')
    if 'data' in args and not args.data: p.error('no data: name the full CIFAR-10 in S9_CIFAR10, or give --data')
    if 'data' in args and args.data != 'sample' and not Path(args.data).expanduser().exists():
        p.error(f'no data: {args.data} is not there')
    if (busy := busy_cores() or 0) > 0.2:  # threads wait for each other, so a step may take 20 times as long
        print(f'{p.prog}: {busy} cores are busy with something else, so the figures will be wrong',
              file=sys.stderr)
    torch.set_num_threads(args.threads)
    return args


@dataclass(frozen=True)
class Source:
    "The images of a run, for those who read PNG files and for those who read arrays"
    path: str  # What `cifar_dls` and `load_cifar` take
    folder: Path  # train/<class>/<n>_<class>.png and test/ likewise, the same images
    n_train: int
    n_test: int


def write_pngs(split, idxs, folder):
    "The images `idxs` of `split` as PNG files, in a folder for each class"
    for c in CLASSES: (folder/c).mkdir(parents=True)
    for i in idxs:
        c = CLASSES[split.labels[i]]
        Image.fromarray(split.images[i]).save(folder/c/f'{i}_{c}.png')


def get_source(path, images=None):
    "`images` training images (None: all) and all test images of the data at `path`; PNG files are written once"
    data = load_cifar(path)
    n, n_test = len(data.train.labels), len(data.test.labels)
    if images is not None and not 0 < images <= n:
        complain(Path(sys.argv[0]).name, f'--images is {images}, but must be 1 to {n}')
    idxs = np.random.default_rng(0).permutation(n)[:images]
    folder = fastai_dir('data')/'s9_benchmarks'/f'{data.key}-{len(idxs)}'
    if not folder.exists():
        print(f'writing {len(idxs) + n_test:,} PNG files to {folder}', file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as tmp:  # a folder that is there is whole
            write_pngs(data.train, idxs, Path(tmp)/'new'/'train')
            write_pngs(data.test, range(n_test), Path(tmp)/'new'/'test')
            (Path(tmp)/'new').rename(folder)
    source = Source(path if len(idxs) == n else str(folder), folder, len(idxs), n_test)
    load_cifar(source.path)  # decoded here once, so that no contestant has to
    return source


def serve(conn, make, kwargs, threads, start_method):
    "The life of a contestant's process: built once, then a repetition for each call"
    multiprocessing.set_start_method(start_method, force=True)  # ours is for our process, not for the workers
    torch.set_num_threads(threads)
    cv2.setNumThreads(0)  # the best setting for small images, so everybody gets it
    try:
        run = make(**kwargs)
        conn.send('ready')
        while conn.recv(): conn.send(run())
    except (EOFError, KeyboardInterrupt): pass  # the script has ended
    except Exception: conn.send(traceback.format_exc())


@dataclass
class Contestant:
    "One who takes part: `make(**kwargs)`, in a process of its own, gives a function that runs one repetition"
    name: str
    make: object
    kwargs: dict
    settings: dict  # for the record
    threads: int = 1
    results: list = field(default_factory=list)  # a dict of measures for each repetition

    def __enter__(self):
        ctx = multiprocessing.get_context('spawn')  # a fork would inherit our memory
        self.conn, theirs = ctx.Pipe()
        args = theirs, self.make, self.kwargs, self.threads, multiprocessing.get_start_method()
        self.process = ctx.Process(target=serve, args=args)
        self.process.start()
        theirs.close()
        return self

    def __exit__(self, *args):
        self.conn.close()
        self.process.join()

    def answer(self, meanwhile=None):
        "What the process sends next; until then `meanwhile(pid)` again and again"
        while meanwhile and not self.conn.poll(0.02): meanwhile(self.process.pid)
        try: got = self.conn.recv()
        except EOFError: sys.exit(f'{self.name}: its process has died')
        if isinstance(got, str) and got != 'ready': sys.exit(f'{self.name}:\n{got}')
        return got

    def run(self, meanwhile=None):
        "One repetition: a dict of measures"
        self.conn.send(True)
        return self.answer(meanwhile)


def interleave(contestants, reps):
    "Fill the `results` of all: everybody once to warm up, then `reps` rounds in which each one has a turn"
    with ExitStack() as stack:
        for c in contestants: stack.enter_context(c).answer()  # one after the other: building takes the CPU too
        for rep in range(reps + 1):
            for c in contestants:
                got = c.run()
                if rep: c.results.append(got)
                shown = '  '.join(f'{k} {v:.4g}' for k, v in got.items())
                print(f'{f"round {rep}" if rep else "warm-up"}  {c.name}: {shown}', file=sys.stderr, flush=True)


def git_commit():
    "The commit of this tree, with -dirty where anything but the results differs from it"
    def git(*args): return subprocess.run(['git', '-C', here.parent, *args], capture_output=True, text=True)
    head = git('rev-parse', 'HEAD')
    if head.returncode: return 'unknown'
    changed = git('status', '--porcelain', '--', '.', ':!benchmarks/results').stdout
    return head.stdout.strip() + ('-dirty' if changed else '')


def versions(*names):
    "The versions of those packages that are installed"
    found = {}
    for nm in names:
        try: found[nm] = version(nm)
        except PackageNotFoundError: pass
    return found


@cache
def facts():
    "What all lines of a run have in common: hardware, versions, commit, command, date"
    env = environment()
    env.pop('deterministic')  # no option of these scripts
    hardware = dict(cpu=env.pop('cpu'), cores=os.cpu_count(), threads=env.pop('threads'),
                    busy_cores_before=busy_cores())
    env.update(versions('pillow', 'opencv-python-headless', 'kornia'))
    command = shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])
    return dict(hardware=hardware, versions=env, commit=git_commit(), command=command,
                date=datetime.now().astimezone().isoformat(timespec='seconds'))


def make_line(what, measure, unit, values, settings):
    "One measured quantity as a JSON line holds it"
    return dict(what=what, measure=measure, n=len(values), median=median(values), min=min(values), max=max(values),
                unit=unit, values=values, settings=settings, **facts())


def lines_of(contestants, units):
    "A line for each contestant and measure; `units` by measure"
    return [make_line(c.name, m, u, [r[m] for r in c.results], c.settings)
            for m, u in units.items() for c in contestants if m in c.results[0]]


def save(lines, folder):
    "Append `lines` to the file in `folder` that is called like the script"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/f'{Path(sys.argv[0]).stem}.jsonl', 'a', encoding='utf-8') as f:
        f.writelines(json.dumps(o) + '\n' for o in lines)


def show(lines, baseline):
    "Print a Markdown table of `lines` of one measure, with ratios to the line called `baseline` where there is one"
    base = next((o for o in lines if o['what'] == baseline), lines[0])
    more = '/s' in base['unit']  # of a rate more is better, of a time or a size less
    word = 'as fast as' if more or base['unit'] in ('s', 'ms') else 'as small as'
    rows = [(base['measure'], f'median, {base["unit"]}', 'min to max', 'n', f'times {word} {base["what"]}')]
    for o in lines:
        ratio = o['median']/base['median'] if more else base['median']/o['median']
        low, mid, high = (f'{o[k]:,.0f}' if o[k] >= 1000 else f'{o[k]:.4g}' for k in ('min', 'median', 'max'))
        rows.append((o['what'], mid, f'{low} to {high}', str(o['n']), f'{ratio:.2f}'))
    widths = [max(map(len, col)) for col in zip(*rows)]
    rows.insert(1, ['-'*w for w in widths])
    print('', *('| ' + ' | '.join(c.ljust(w) for c, w in zip(r, widths)) + ' |' for r in rows), sep='\n', flush=True)
