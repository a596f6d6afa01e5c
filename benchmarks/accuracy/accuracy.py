"""Trains a recipe from several seeds with s9_sweep and appends one row: recipe, every epoch, mean and deviation.

Options that are not listed here are passed to s9_sweep, such as `--epochs 8` or `--held-out 5000`. Started again, the
script resumes runs that were stopped and repeats none. The sweep is in `runs/accuracy`, in a folder of that name, with
the commit of each run in commits.json. Other options need another name.
"""
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check, curves, facts, git_commit, jobs_option, options, root, save, seeds_option
from robustness import recognised
from s9_fastai.app.command import RunFailed
from s9_fastai.app.sweep import s9_sweep, sweep_parser, sweep_results
from s9_fastai.cifar.load import load_cifar
from s9_fastai.data.loader import hold_out
from s9_fastai.app.recipe import Recipe
from s9_fastai.nets.tta import FlipTTA
from s9_fastai.app.run import open_run


def saved(folder): return json.loads((folder/'recipe.json').read_text())


def history(folder):
    "The epochs of the run in `folder`; no rows where it has none"
    path = folder/'history.csv'
    return pd.read_csv(path) if path.is_file() else pd.DataFrame({'epoch': []})


def run_folder(folder, seed): return folder/'runs'/f'seed={seed}'


def commits(folder, seeds):
    "The commit of each run of the sweep in `folder`, by seed; that of now for a run that is still to begin"
    path, now = folder/'commits.json', git_commit()
    found = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    return found | {str(s): now for s in seeds if not (run_folder(folder, s)/'recipe.json').is_file()}


def train(folder, args, rest):
    "Train what is missing of the sweep in `folder`; a ValueError for options that cannot be used"
    own = {k: v for k, v in vars(sweep_parser().parse_args(rest)).items() if v not in (None, False)}
    if wrong := own.keys() & {'grid', 'random', 'optuna', 'out'}: raise ValueError(f'--{min(wrong)} is not for this script: leave it out')
    begun, own = commits(folder, args.seeds), own | dict(jobs=args.jobs, seeds=','.join(map(str, args.seeds)))
    try: s9_sweep(out=folder, **own)
    except RunFailed as e: print(e, file=sys.stderr)  # the others are complete
    finally:
        if folder.is_dir(): (folder/'commits.json').write_text(json.dumps(begun, indent=2), encoding='utf-8')


def seconds(times):
    "Seconds in a column of fastai's times, such as 01:35 or 1:00:02"
    return sum(60**i*int(o) for t in times for i, o in enumerate(reversed(t.split(':'))))


def mirrored(folder):
    "Accuracy in % of the weights of the run in `folder`, on the images that validated it, with flip TTA"
    run = open_run(folder)
    recipe, data = run.recipe, load_cifar(run.kept_source())
    images, labels = data.test.images, data.test.labels
    if recipe.held_out:
        at = hold_out(data.train.labels, recipe.held_out)
        images, labels = data.train.images[at], data.train.labels[at]
    return 100*float(recognised(FlipTTA(run.net()[0]), images, labels).mean())


def line(what, folders, failed, jobs, begun):
    "The result of the complete runs in `folders`, a dict by seed; `begun` has their commits"
    dfs = {seed: history(f) for seed, f in folders.items()}
    abouts = [saved(f) for f in folders.values()]
    recipe = {f.name: abouts[0][f.name] for f in fields(Recipe) if f.name in abouts[0]}
    values = [100*df.valid_accuracy.iloc[-1] for df in dfs.values()]
    images = 'held-out images' if recipe.get('held_out') else 'test images'
    return dict(
        what=what, measure=f'accuracy on the {images} after the last epoch', unit='%', n=len(values),
        mean=mean(values), std=stdev(values) if len(values) > 1 else None, values=values,
        mirrored=[mirrored(f) for f in folders.values()], seeds=[*dfs], recipe=recipe,
        autocast_dtype=abouts[0]['autocast_dtype'], epochs=recipe['epochs'], failed=failed, runs_at_once=jobs,
        seconds=[seconds(df.time) for df in dfs.values()], histories={s: curves(df) for s, df in dfs.items()},
        **{**facts(), 'commit': ', '.join(sorted({begun.get(str(s), 'unknown') for s in folders}))})


def parser():
    p = options(__doc__)
    p.add_argument('name', help='of the result, and of the folder of its runs')
    seeds_option(p, [0, 1, 2])
    jobs_option(p)
    p.add_argument('--folder', type=Path, default=root/'runs'/'accuracy', help='folder of the runs')
    return p


def main():
    p = parser()
    args, rest = p.parse_known_args()
    check(p, args)
    os.environ['OMP_NUM_THREADS'] = str(args.threads)
    folder = args.folder/args.name
    try: train(folder, args, rest)
    except (ValueError, OSError) as e: p.error(f'{e}; a result of another name has a folder of its own')
    results = {o.seed: o for o in sweep_results(folder) if o.seed in args.seeds}
    failed = {seed: o.error or o.state for seed, o in results.items() if o.state != 'done'}
    folders = {seed: run_folder(folder, seed) for seed in args.seeds if seed not in failed}
    if not folders: sys.exit('no run is complete')
    o = line(args.name, folders, failed, args.jobs, commits(folder, args.seeds))
    save([o], args.out)
    spread = '' if o['std'] is None else f', standard deviation {o["std"]:.2f}'
    print(f'{o["what"]}: {o["mean"]:.2f}% (n = {o["n"]}{spread}), {o["measure"]}')
    sys.exit(bool(failed))


if __name__ == '__main__': main()
