"Trains the same run in several processes, with 0, 1 and 2 workers and both kinds of augmentation, and compares the hashes of their results"
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import command, facts, options, parse, save
from kill import fingerprint


def run_hash(folder, **kwargs):
    "The `fingerprint` of a new run in `folder` with the options `kwargs`"
    args = [str(o) for k, v in kwargs.items() for o in (f'--{k}', v)]
    done = subprocess.run(command('--data', 'sample', *args, '--out', folder), capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return fingerprint(folder)


def hashes(repeats, **kwargs):
    "Hashes of `repeats` runs for each augmentation, compute and number of workers: (settings, list of hashes) each"
    with TemporaryDirectory() as tmp:
        for compute in ('plain', 'fast'):
            for augment in ('item', 'batch'):
                for workers in (0, 1, 2):
                    o = dict(compute=compute, augment=augment, workers=workers)
                    name = '-'.join(map(str, o.values()))
                    yield o, [run_hash(Path(tmp)/f'{name}-{i}', **o, **kwargs) for i in range(repeats)]


def main():
    p = options(__doc__, repeats=2)
    p.add_argument('--epochs', type=int, default=2, help='epochs of a run')
    p.add_argument('--bs', type=int, default=128, help='images a batch, of 2,000')
    args = parse(p)
    os.environ['OMP_NUM_THREADS'] = str(args.threads)
    print('| compute | augment | workers | hashes of weights, history and log |', '|---|---|---|---|', sep='\n')
    found, lines = {}, []
    for o, hs in hashes(args.repeats, epochs=args.epochs, bs=args.bs):
        print('|', ' | '.join(map(str, [*o.values(), ' '.join(hs)])), '|', flush=True)
        found.setdefault((o['compute'], o['augment']), set()).update(hs)
        lines.append(dict(what='hash of a run', measure='weights, history and log', n=len(hs), values=hs,
                          settings=dict(**o, epochs=args.epochs, bs=args.bs), **facts()))
    save(lines, args.out)
    same = all(len(hs) == 1 for hs in found.values())
    print(f'\n{"each pair of compute and augment has one hash, with any process and number of workers" if same else "THE HASHES DIFFER"}')
    sys.exit(not same)


if __name__ == '__main__': main()
