"""Trains a recipe from several seeds and appends one row: recipe, every epoch, mean and deviation.

Options that are not listed here are passed to s9_train, such as `--epochs 8` or `--held-out 5000`. A run that was killed
is resumed when the script is started again, and a complete one is not repeated: run folders are in `runs/accuracy`,
each beside a .json with its options and its commit. Other options need another name.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check, command, curves, facts, git_commit, jobs_option, options, root, save, seeds_option
from robustness import recognised
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


def is_complete(folder):
    return (folder/'weights.safetensors').is_file() and len(history(folder)) == saved(folder)['epochs']


def begin(folder, args):
    "The options and the commit of the run in `folder`; those of now where there is no run yet"
    path = folder.with_suffix('.json')
    if not (folder/'recipe.json').is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(args=[*map(str, args)], commit=git_commit())), encoding='utf-8')
    return json.loads(path.read_text(encoding='utf-8'))


def train(folder, args):
    "One run, started or resumed: None, or the last line of its output when it failed"
    there, begun = (folder/'recipe.json').is_file(), begin(folder, args)['args']
    if begun != [*map(str, args)]: return f'{folder} was started with {" ".join(begun)}: give the result another name'
    if is_complete(folder): return None
    more = ['--resume', folder] if there else ['--out', folder, *args]
    with open(folder.with_suffix('.txt'), 'a', encoding='utf-8') as f:
        done = subprocess.run(command(*more), stdout=f, stderr=subprocess.STDOUT)
    if not done.returncode: return None
    said = folder.with_suffix('.txt').read_text(encoding='utf-8').strip().splitlines()
    return f'exit code {done.returncode}: {said[-1] if said else "no output"}'


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


def line(what, folders, failed, jobs):
    "The result of the complete runs in `folders`, a dict by seed"
    dfs = {seed: history(f) for seed, f in folders.items()}
    abouts = [saved(f) for f in folders.values()]
    recipe, *others = [{f.name: o[f.name] for f in fields(Recipe) if f.name in o} for o in abouts]
    if any(o != recipe for o in others): sys.exit(f'the runs of {what} have different recipes: take another name')
    values = [100*df.valid_accuracy.iloc[-1] for df in dfs.values()]
    images = 'held-out images' if recipe.get('held_out') else 'test images'
    return dict(
        what=what, measure=f'accuracy on the {images} after the last epoch', unit='%', n=len(values),
        mean=mean(values), std=stdev(values) if len(values) > 1 else None, values=values,
        mirrored=[mirrored(f) for f in folders.values()], seeds=[*dfs], recipe=recipe,
        autocast_dtype=abouts[0]['autocast_dtype'], epochs=recipe['epochs'], failed=failed, runs_at_once=jobs,
        seconds=[seconds(df.time) for df in dfs.values()], histories={s: curves(df) for s, df in dfs.items()},
        **{**facts(), 'commit': ', '.join(sorted({begin(f, ())['commit'] for f in folders.values()}))})


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
    folders = {seed: args.folder/args.name/f'seed-{seed}' for seed in args.seeds}
    with ThreadPoolExecutor(args.jobs) as pool:
        said = [*pool.map(lambda s: train(folders[s], ['--seed', s, *rest]), folders)]
    failed = {seed: o for seed, o in zip(folders, said) if o}
    for seed, o in failed.items(): print(f'seed {seed}: {o}', file=sys.stderr)
    folders = {s: f for s, f in folders.items() if s not in failed}
    if not folders: sys.exit('no run is complete')
    o = line(args.name, folders, failed, args.jobs)
    save([o], args.out)
    spread = '' if o['std'] is None else f', standard deviation {o["std"]:.2f}'
    print(f'{o["what"]}: {o["mean"]:.2f}% (n = {o["n"]}{spread}), {o["measure"]}')
    sys.exit(bool(failed))


if __name__ == '__main__': main()
