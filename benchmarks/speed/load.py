"Seconds of an epoch on a quiet machine and beside busy processes, by number of threads and by how these wait"
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_line, options, parse, save, show
from methods import make_recipe
from rounds import Method, get_source

# OpenMP of torch reads these once, when torch is imported
WAITS = {'default': {}, 'passive': {'OMP_WAIT_POLICY': 'PASSIVE'},
         'spin 1000': {'GOMP_SPINCOUNT': '1000'}, 'spin 10000': {'GOMP_SPINCOUNT': '10000'}}


@dataclass
class Case(Method):
    "A training in a process with its own variables of OpenMP"
    env: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)  # a list by number of busy processes

    def __enter__(self):
        with patch.dict(os.environ, self.env): return super().__enter__()


@contextmanager
def busy(n):
    "`n` processes that each keep a core busy"
    ps = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(n)]
    try: yield
    finally:
        for p in ps: p.kill()
        for p in ps: p.wait()


def interleave(cases, loads, repeats):
    "Fill the `seconds` of all: a warm-up, then rounds in which every case runs once under each load"
    with ExitStack() as stack:
        for c in cases: stack.enter_context(c).receive()
        for c in cases: c.run()
        for rep in range(repeats):
            for load in loads:
                with busy(load):
                    for c in cases: c.seconds.setdefault(load, []).append(c.run()['epoch'])
            print(f'round {rep + 1}', *(f'{c.name}: {c.seconds[load][-1]:.2f} s with {load} busy' for load in loads
                                        for c in cases), sep='\n  ', file=sys.stderr, flush=True)


def main():
    p = options(__doc__, repeats=5)
    p.add_argument('--loads', type=int, nargs='+', default=[0, 1], metavar='N', help='busy processes beside the training')
    p.add_argument('--waits', nargs='+', choices=[*WAITS], default=[*WAITS], metavar='NAME', help=f'one or more of: {", ".join(WAITS)}')
    args = parse(p)
    source = get_source('sample')
    made = dict(source=source, bs=64, workers=0, name='sample')
    cases = [Case(f'{args.threads} threads, {wait}', make_recipe, made, dict(wait=wait, bs=64), args.threads, env=WAITS[wait])
             for wait in args.waits]
    cases.append(Case('1 thread', make_recipe, made, dict(wait='default', bs=64), 1))
    interleave(cases, args.loads, args.repeats)
    for load in args.loads:
        lines = [make_line(c.name, f'epoch of sample, {load} busy processes', 's', c.seconds[load],
                           {**c.settings, 'threads': c.threads, 'busy': load}) for c in cases]
        save(lines, args.out)
        show(lines, cases[0].name)


if __name__ == '__main__': main()
