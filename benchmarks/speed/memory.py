"Peak memory of `s9_train`, and of one epoch with the test at its end with each method, all processes; Linux only"
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import command, make_line, method_options, options, parse, save, show
from epochs import method
from methods import EPOCHS
from rounds import get_source, lines_of


def family(pid):
    "`pid` and the processes below it"
    below = [int(c) for f in Path(f'/proc/{pid}/task').glob('*/children') for c in f.read_text().split()]
    return [pid, *(p for c in below for p in family(c))]


def kilobytes(pid, file, *names):
    "The sum of the fields `names` of a file in /proc"
    fields = dict(ln.split(':', 1) for ln in Path(f'/proc/{pid}/{file}').read_text().splitlines() if ':' in ln)
    return sum(int(fields[nm].split()[0]) for nm in names)


def memory(pid):
    "MB that `pid` and its workers hold: files mapped by `pid`, and all other pages, each counted once"
    total = kilobytes(pid, 'status', 'RssFile')  # libraries are shared with other programs, so their pages are not divided
    for p in family(pid):
        try: total += kilobytes(p, 'smaps_rollup', 'Pss_Anon', 'Pss_Shmem')
        except (OSError, KeyError): pass  # a worker that has just ended
    return total/1024


class Peak:
    "The highest value of `memory` so far, and the kernel's own peak of the main process"
    def __init__(self): self.all, self.main = 0., 0.

    def __call__(self, pid):
        try:
            self.all = max(self.all, memory(pid))
            self.main = kilobytes(pid, 'status', 'VmHWM')/1024
        except (OSError, KeyError): pass  # the process has just ended


def of_command(data):
    "Peak of `s9_train` on all images, MB: two epochs, weights and figures; called before there are other children"
    with TemporaryDirectory() as tmp:
        args = ['--data', data, '--epochs', '2', '--augment', 'batch', '--out', f'{tmp}/run']
        subprocess.run(command(*args), check=True, capture_output=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1024


def measure(m):
    "A training run of the method `m` in a fresh process"
    peak = Peak()
    with m:
        m.receive(peak)
        m.run(peak)
        peak(m.process.pid)
    # the kernel misses no moment but has no sum; the samples have the sum but miss moments
    return {'peak memory': max(peak.all, peak.main), 'peak of the main process': peak.main}


def main():
    p = options(__doc__, repeats=3)
    method_options(p, [nm for nm in EPOCHS if nm != 'bare'])
    p.add_argument('--images', type=int, help='training images, drawn once; not given: all')
    p.add_argument('--bs', type=int, default=128, help='images a batch')
    args = parse(p)
    if not Path('/proc/self/smaps_rollup').exists(): p.error('memory is read from /proc, which this system does not have')
    lines = [make_line('s9_train --augment batch, 2 epochs', 'peak memory', 'MB', [of_command(args.data)], {})]
    source = get_source(args.data, args.images)
    group = [method(key, args.bs, source, args.threads) for key in args.methods]
    for rep in range(args.repeats):
        for m in group:
            m.results.append(measure(m))
            print(f'round {rep + 1}  {m.name}: {m.results[-1]["peak memory"]:,.0f} MB', file=sys.stderr, flush=True)
    lines += lines_of(group, {'peak memory': 'MB', 'peak of the main process': 'MB'})
    save(lines, args.out)
    show([o for o in lines if o['measure'] == 'peak memory'], EPOCHS['fastai'][0])


if __name__ == '__main__': main()
