"Methods measured in interleaved rounds, each in a process of its own, and the images that all of them read"
import multiprocessing
import sys
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import complain, make_line, script
from s9_fastai.cifar.facts import CLASSES
from s9_fastai.data.cache import fastai_dir
from s9_fastai.cifar.load import load_cifar


@dataclass(frozen=True)
class Source:
    "The images of a run, for methods that read PNG files and for those that read arrays"
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
    if images is not None and not 0 < images <= n: complain(script.name, f'--images is {images}, but must be 1 to {n}')
    idxs = np.random.default_rng(0).permutation(n)[:images]
    folder = fastai_dir('data')/'s9_benchmarks'/f'{data.key}-{len(idxs)}'
    if not folder.exists():
        print(f'writing {len(idxs) + n_test:,} PNG files to {folder}', file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as tmp:  # renamed when it is complete
            write_pngs(data.train, idxs, Path(tmp)/'new'/'train')
            write_pngs(data.test, range(n_test), Path(tmp)/'new'/'test')
            (Path(tmp)/'new').rename(folder)
    source = Source(path if len(idxs) == n else str(folder), folder, len(idxs), n_test)
    load_cifar(source.path)  # decoded here once, so that no method has to
    return source


def serve(conn, make, kwargs, threads, start_method):
    "The process of a method: built once, then a repetition for each message"
    multiprocessing.set_start_method(start_method, force=True)  # ours is for our process, not for the workers
    torch.set_num_threads(threads)
    cv2.setNumThreads(0)  # the best setting for small images, for every method
    try:
        run = make(**kwargs)
        conn.send('ready')
        while conn.recv(): conn.send(run())
    except (EOFError, KeyboardInterrupt): pass  # the script has ended
    except Exception: conn.send(traceback.format_exc())


@dataclass
class Method:
    "What is compared: `make(**kwargs)`, in a process of its own, returns a function that runs one repetition"
    name: str
    make: object
    kwargs: dict
    settings: dict  # for the results
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

    def receive(self, meanwhile=None):
        "The next message of the process; until then `meanwhile(pid)` again and again"
        while meanwhile and not self.conn.poll(0.02): meanwhile(self.process.pid)
        try: got = self.conn.recv()
        except EOFError: sys.exit(f'{self.name}: its process has died')
        if isinstance(got, str) and got != 'ready': sys.exit(f'{self.name}:\n{got}')
        return got

    def run(self, meanwhile=None):
        "One repetition: a dict of measures"
        self.conn.send(True)
        return self.receive(meanwhile)


def interleave(methods, repeats):
    "Fill the `results` of all: each once as a warm-up, then `repeats` rounds of one repetition each"
    with ExitStack() as stack:
        for m in methods: stack.enter_context(m).receive()  # one after the other: building takes the CPU too
        for rep in range(repeats + 1):
            for m in methods:
                got = m.run()
                if rep: m.results.append(got)
                shown = '  '.join(f'{k} {v:.4g}' for k, v in got.items())
                print(f'{f"round {rep}" if rep else "warm-up"}  {m.name}: {shown}', file=sys.stderr, flush=True)


def lines_of(methods, units):
    "A row for each method and measure; `units` by measure"
    return [make_line(m.name, measure, unit, [r[measure] for r in m.results], m.settings)
            for measure, unit in units.items() for m in methods if measure in m.results[0]]
