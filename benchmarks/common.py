"What the measuring scripts share: options, rows of results with hardware and versions, tables"
import argparse
import json
import os
import shlex
import subprocess
import sys
from datetime import datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which
from statistics import median

import torch

from s9_fastai.app.command import complain
from s9_fastai.core.cores import busy_cores
from s9_fastai.core.environment import environment
from s9_fastai.training.fast import autocast_dtype

root = Path(__file__).resolve().parent.parent  # of the repository
script = Path(sys.argv[0]).resolve()

# ---- options


def options(doc, repeats=None):
    "An argparse parser with the options of every script; without `repeats` nothing is repeated"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.error = partial(complain, p.prog)
    if repeats: p.add_argument('--repeats', type=int, default=repeats, help='repetitions that count')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='threads of torch in each process')
    p.add_argument('--out', type=Path, default=root/'benchmarks'/'results', help='folder of the results')
    return p


def data_option(p):
    "Add the option of scripts that read images"
    p.add_argument('--data', default=os.environ.get('S9_CIFAR10'), help="the full CIFAR-10, or 'sample' to try out")


def method_options(p, names):
    "Add the options of scripts that compare methods; `names` are the methods"
    data_option(p)
    p.add_argument('--methods', nargs='+', choices=names, default=names, metavar='NAME', help=f'methods to compare: {", ".join(names)}')


def seeds_option(p, default):
    "Add the option of scripts that train from several seeds"
    p.add_argument('--seeds', type=int, nargs='+', default=default, help='of weights, order and augmentation; one run for each')


def jobs_option(p): p.add_argument('--jobs', type=int, default=1, help='runs at once')


def variants_argument(p, names):
    "Add the argument of scripts that change one thing at a time; `names` are the changes"
    p.add_argument('variants', nargs='*', metavar='VARIANT', help=f'one of: {", ".join(names)}; none: all')


def check(p, args):
    "`args` of the parser `p`; one line and exit code 2 where they cannot be used"
    if 'repeats' in args and args.repeats < 1: p.error(f'--repeats is {args.repeats}, but must be at least 1')
    if 'data' in args and not args.data: p.error('no data: name the full CIFAR-10 in S9_CIFAR10, or give --data')
    if 'data' in args and args.data != 'sample' and not Path(args.data).expanduser().exists():
        p.error(f'no data: {args.data} does not exist')
    if (busy := busy_before()) > 0.2:  # threads wait for each other, so a step may take 20 times as long
        print(f'{p.prog}: other processes keep {busy} cores busy, so times will be wrong', file=sys.stderr)
    torch.set_num_threads(args.threads)
    return args


def parse(p): return check(p, p.parse_args())


def chosen(p, variants, names):
    "The `variants`, if each is one of `names`; all names where none is given"
    if wrong := [o for o in variants if o not in names]: p.error(f'no variant {wrong[0]!r}: {", ".join(names)}')
    return variants or [*names]


def command(*args):
    "The command line of `s9_train`"
    return [Path(sys.executable).with_name('s9_train'), *map(str, args)]


# ---- rows of results


@cache
def busy_before():
    "Cores that are busy before a script begins, measured for a second"
    return round(busy_cores(1), 2)


def git_commit():
    "The commit of this tree, with -dirty where anything but the results differs from it"
    if not which('git'): return 'unknown'
    def git(*args): return subprocess.run(['git', '-C', root, *args], capture_output=True, text=True)
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
    "What all rows of a run have in common: hardware, versions, commit, command, date"
    env = environment()
    env.pop('deterministic')  # no option of these scripts
    hardware = dict(cpu=env.pop('cpu'), cores=os.cpu_count(), threads=env.pop('threads'),
                    busy_cores_before=busy_before())
    env.update(versions('pillow', 'opencv-python-headless', 'kornia'))
    path = script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name
    return dict(hardware=hardware, versions=env, commit=git_commit(), command=shlex.join(['python', path, *sys.argv[1:]]),
                date=datetime.now().astimezone().isoformat(timespec='seconds'))


def cpu_dtype():
    "The dtype in which `compute='fast'` computes on this CPU, such as bfloat16"
    return str(autocast_dtype(torch.device('cpu'))).removeprefix('torch.')


def curves(df):
    "The columns of a history, as lists"
    return {k: [round(v, 6) for v in df[k].tolist()] for k in df if k not in ('epoch', 'time')}


def make_line(what, measure, unit, values, settings):
    "One measured quantity as a row of the results"
    return dict(what=what, measure=measure, n=len(values), median=median(values), min=min(values), max=max(values),
                unit=unit, values=values, settings=settings, **facts())


def save(lines, folder):
    "Append `lines` to the JSON lines in `folder` that have the name of the script"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/f'{script.stem}.jsonl', 'a', encoding='utf-8') as f:
        f.writelines(json.dumps(o) + '\n' for o in lines)


def read_lines(path):
    "The rows of a file of results; none where there is no file"
    return [json.loads(o) for o in path.read_text(encoding='utf-8').splitlines()] if path.is_file() else []


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
