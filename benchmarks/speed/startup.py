"Seconds until `s9_train` has its first batch, with a warm cache, and to build a cold cache from an archive and PNG files"
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, time

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_line, method_options, options, parse, save, show
from rounds import get_source
from s9_fastai.cifar.load import load_cifar

# a Learner gets this callback because it is among fastai's defaults; it ends the process after one batch
CHILD = '''
import sys, time, os
from fastcore.foundation import defaults
from s9_fastai.app import train
from fastai.callback.core import Callback
class First(Callback):
    order = -100
    def before_batch(self): print('\\nTIME', time.time(), flush=True)
    def after_step(self): print('\\nTIME', time.time(), flush=True), os._exit(0)
defaults.callbacks.append(First)
train.main_train()
'''


def first_batch(data):
    "Seconds from the start of the process to the start and the end of the first training step"
    with TemporaryDirectory() as tmp:
        start = time()
        run = subprocess.run([sys.executable, '-c', CHILD, '--data', data, '--out', f'{tmp}/run'], capture_output=True,
                             text=True, check=True)
    return [float(ln.split()[1]) - start for ln in run.stdout.splitlines() if ln.startswith('TIME ')]


def cold_cache(path):
    "Seconds to read, check and decode `path` into a new cache"
    with TemporaryDirectory() as tmp:
        start = perf_counter()
        load_cifar(path, cache_dir=Path(tmp)/'cache')
        return perf_counter() - start


def main():
    p = options(__doc__, repeats=5)
    method_options(p, ['warm', 'cold'])
    args = parse(p)
    source, lines = get_source(args.data), []
    if 'warm' in args.methods:
        begins, ends = zip(*[first_batch(args.data) for _ in range(args.repeats + 1)][1:])
        lines += [make_line(nm, 'after the start of s9_train, warm cache', 's', list(v), {})
                  for nm, v in (('first batch begins', begins), ('first step is done', ends))]
    if 'cold' in args.methods:
        kinds = {'archive': args.data, 'folder of PNG files': source.folder}
        lines += [make_line(nm, 'building the cache', 's', [cold_cache(path) for _ in range(args.repeats)],
                            dict(images=source.n_train + source.n_test)) for nm, path in kinds.items()]
    save(lines, args.out)
    for measure in dict.fromkeys(o['measure'] for o in lines): show([o for o in lines if o['measure'] == measure], '')


if __name__ == '__main__': main()
