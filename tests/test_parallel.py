"""Fits on two and three processes, with gloo, end as those on one: weights, buffers, losses and metrics in float64. They go on after a signal or an
error, to the bit, and end when one of them is gone"""
import json
import os
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.data.core import TfmdDL
from fastai.data.load import SkipItemException
from fastai.learner import Metric
from filelock import FileLock
from torch.utils.data import IterableDataset

import parallel
import processes
from s9_fastai.augment.keyed import KeyedDL
from s9_fastai.augment.share import Share
from s9_fastai.core.weights import read_tensors
from s9_fastai.training.collect import SeenBatches, accumulate_all
from s9_fastai.training.rank_metrics import check_shared

script = Path(parallel.__file__)
processes.server.set_forkserver_preload([*processes.preloaded, 'torch._dynamo', 'fastai.vision.all', 'fastai.tabular.all', 'fastai.text.data'])
runs = [nm for nm in parallel.cases if nm.startswith('run_') and nm != 'run_taken_up']
alike = [nm for nm in parallel.cases if not nm.startswith(('run_', 'dropout', 'mixup', 'norm_apart', 'script'))]
of_three = ['uneven', 'plain_recorder', 'whole_batch', 'few_images', 'odd_size', 'accumulate', 'norm_1d', 'norm_2d', 'norm_whole', 'many_metrics',
            'array_item_2', 'texts_uneven_0']


def start(n, folder, *args):
    "`n` processes of the script, or one without a launcher's variables"
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(n)) if n > 1 else {}
    group = []
    for r in range(n):
        logs = [str(folder/f'{nm}{r}.log') for nm in ('out', 'err')]
        own = dict(env, RANK=str(r), LOCAL_RANK=str(r)) if n > 1 else {}
        env_of_it = {**os.environ, 'OMP_NUM_THREADS': '1', **own}
        p = processes.server.Process(target=processes.main, args=(str(script), [str(folder), *args], '.', env_of_it, *logs, False, 'fork'))
        p.start()
        group.append(p)
    return group


def end(group, folder, seconds=400):
    "Wait for all, or show what the first one that failed has written"
    until = time.monotonic() + seconds
    for p in group: p.join(max(0, until - time.monotonic()))
    codes = [p.exitcode for p in group]
    for p in group: p.kill()
    assert not any(c != 0 for c in codes), (codes, *((folder/f'err{r}.log').read_text()[-3000:] for r in range(len(group))))


def once(factory, name, make):
    "The folder that `make` fills; by one of pytest's workers, and all of them read it"
    base = factory.getbasetemp()
    top = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/name
    with FileLock(f'{top}.lock'):
        if not top.exists():
            top.mkdir()
            make(top)
    return top


def run_all(top):
    jobs = {1: [*alike, 'script'], 2: [*alike, 'mixup', 'norm_apart', 'dropout', 'dropout_again', *runs, 'script'], 3: [*of_three, 'run_whole', 'run_broken', 'script']}
    groups = {n: start(n, top/str(n), *names) for n, names in jobs.items()}
    try:
        for n, group in groups.items(): end(group, top/str(n))
    finally:
        for p in sum(groups.values(), []): p.kill()


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "A function of a case and a number of processes: what each process has"
    top = once(tmp_path_factory, 'parallel', run_all)
    def read(name, n): return [read_tensors(top/str(n)/f'{name}.{r}.safetensors')[0] for r in range(n)]
    read.top = top
    return read


def same(a, b): return all(torch.equal(a[k].nan_to_num(-1), b[k].nan_to_num(-1)) for k in a)
def apart(a, b): return (a.nan_to_num(-1) - b.nan_to_num(-1)).abs().max().item() if a.numel() else 0.


@pytest.mark.parametrize('n,name', [*((2, nm) for nm in alike), *((3, nm) for nm in of_three)])
def test_as_one_process(results, n, name):
    one, *_ = results(name, 1)
    ranks = results(name, n)
    for o in ranks:
        for k in 'weights', 'buffers', 'seen', 'values': assert torch.equal(o[k].nan_to_num(-1), ranks[0][k].nan_to_num(-1)), k
    for k in 'weights', 'buffers', 'seen', 'losses': assert apart(one[k], ranks[0][k]) < 1e-12, k
    assert one['values'].shape == ranks[0]['values'].shape and one['values'].shape[0] == 2
    assert apart(one['values'], ranks[0]['values']) < 1e-7  # the accuracy is float32


def test_norms_apart_have_the_same_statistics_in_each_process(results):
    a, b = results('norm_apart', 2)
    assert a['seen'].shape[0] == 8 and same(a, b)


def test_dropout(results):
    (a, b), (again, _) = results('dropout', 2), results('dropout_again', 2)
    assert torch.equal(a['weights'], b['weights']) and not torch.equal(a['seen'], b['seen'])
    assert same(a, again)


def test_mixup(results):
    a, b = results('mixup', 2)
    assert torch.equal(a['weights'], b['weights']) and a['weights'].isfinite().all()


@pytest.mark.parametrize('n', [2, 3])
def test_a_script_around_its_fits(results, n):
    "validate, get_preds, lr_find, save, load and export in the block; validate and get_preds after it"
    one, *_ = results('script', 1)
    for o in results('script', n):
        for k in 'weights', 'preds', 'after': assert apart(one[k], o[k]) < 1e-7, k
        assert apart(one['rows'], o['rows']) < 1e-6 and len(o['rows']) == 4
    assert {p.name for p in (results.top/str(n)/'script').iterdir()} == {'exported.pkl', 'models'}
    assert [p.name for p in (results.top/str(n)/'script'/'models').iterdir()] == ['saved.pth']


# Checkpoints

def history(results, n, name): return [line.split(',')[:-1] for line in (results.top/str(n)/name/'history.csv').read_text().splitlines()]  # without the time


@pytest.mark.parametrize('n,name', [(2, 'broken'), (2, 'stopped'), (2, 'damaged'), (3, 'broken')])
def test_resumed_to_the_bit(results, n, name):
    whole, broken = results('run_whole', n), results(f'run_{name}', n)
    for a, b in zip(whole, broken):
        for k in 'weights', 'buffers', 'values': assert torch.equal(a[k], b[k]), k
    assert history(results, n, 'whole') == history(results, n, name) and len(history(results, n, name)) == 4


def test_both_stop_at_the_same_batch_for_a_signal_of_one(results):
    texts = [(results.top/'2'/f'stopped.{r}.txt').read_text().splitlines() for r in range(2)]
    places = [[line.split(' at ')[1].split(';')[0] for line in lines if line] for lines in texts]
    assert places[0] == places[1] and len(places[0]) == 4 and all(line.startswith('Stopped stopped by SIGTERM') for line in texts[0] if line)
    assert places[0][:2] == ['batch 3 of the training of epoch 1', 'the end of epoch 1']


def test_rank_0_alone_writes(results):
    assert not [*results.top.glob('*/*_of_another')]


def test_another_number_of_processes(results, tmp_path):
    shutil.copytree(results.top/'2'/'left', tmp_path/'left')
    end(start(1, tmp_path, 'run_taken_up'), tmp_path)
    out = (tmp_path/'out0.log').read_text()
    assert 'resuming from the end of epoch 1; it was saved by 2 processes, and this is a run of 1' in out
    assert len((tmp_path/'left'/'history.csv').read_text().splitlines()) == 4


# Processes that are gone

def lose_all(top):
    groups = {how: start(2, top/how, 'lose', how) for how in ('kill', 'raise', 'stop')}
    for first, _ in groups.values(): first.join(120)
    (top/'codes.json').write_text(json.dumps({how: first.exitcode for how, (first, _) in groups.items()}))
    for p in sum(groups.values(), []): p.kill()


@pytest.fixture(scope='module')
def lost(tmp_path_factory):
    "A function of how rank 1 went: exit code, output and errors of rank 0"
    top = once(tmp_path_factory, 'lost', lose_all)
    codes = json.loads((top/'codes.json').read_text())
    return lambda how: (codes[how], *((top/how/f'{nm}0.log').read_text() for nm in ('out', 'err')))


def test_killed(lost):
    code, out, err = lost('kill')
    assert code == 0 and out.startswith('RankLost rank 1 of 2 is gone, without a sign for') and 'nothing that was saved is lost: start again' in out


def test_stopped_without_a_word(lost):
    code, out, err = lost('stop')
    assert code == 1 and not out and len(err.strip().splitlines()) == 1
    assert err.startswith('rank 1 of 2 is gone, without a sign for') and err.endswith('nothing that was saved is lost: start again\n')


def test_failed(lost):
    "The error of another process, whichever way it is noticed first"
    code, out, err = lost('raise')
    assert 'rank 1 has failed: Broken: ' in out + err and 'no more; nothing that was saved is lost' in out + err


# What is refused

class Endless(IterableDataset):
    def __iter__(self): return iter(range(9))


def test_iterable_data_set():
    with pytest.raises(ValueError, match='KeyedDL cannot divide its batches among processes: its data set must have a length'):
        check_shared(SimpleNamespace(loaders=[KeyedDL(Endless(), bs=3)]))
    check_shared(SimpleNamespace(loaders=[KeyedDL([*range(9)], bs=3)]))


class Skipping(TfmdDL):
    def create_item(self, s):
        if s == 4: raise SkipItemException
        return super().create_item(s)


@pytest.mark.parametrize('rank', [0, 1])
def test_skipped_items(rank):
    from s9_fastai.augment.keyed import make_keyed
    dl = Skipping([*range(8)], bs=4, num_workers=0)
    make_keyed(dl)
    assert [len(b) for b in dl] == [4, 3]
    dl.share = Share(rank, 2)
    if rank == 1: assert [b.tolist() for b in dl] == [[2, 3], [6, 7]]
    else:
        with pytest.raises(ValueError, match='an item was skipped, but several processes need as many batches each: leave such items out'): list(dl)


class Reads(Metric):
    def reset(self): pass
    def accumulate(self, learn): self.value = learn.xb[0].sum()


def test_metric_of_the_input():
    seen = SeenBatches()
    seen.add(0, torch.zeros(4, 2), (torch.zeros(4),), torch.tensor(1.))
    with pytest.raises(ValueError, match='a metric reads the input of the model, which stays in the process that made it'):
        accumulate_all([Reads()], SimpleNamespace(xb=(torch.ones(2),)), seen)


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_parts_are_the_whole(n):
    "Every image of an epoch in one part, in any place of resumption, with and without workers' offsets"
    dl = KeyedDL([*range(31)], bs=7, shuffle=True, seed=3, num_workers=0)
    whole = [b.tolist() for b in dl]
    for least in 0, 1, 2:
        parts = []
        for r in range(n):
            dl = KeyedDL([*range(31)], bs=7, shuffle=True, seed=3, num_workers=0)
            dl.share = Share(r, n, least)
            made = iter(b.tolist() for b in dl)
            dl_sizes = [np.diff(Share(r, n, least).part(len(b)))[0] for b in whole]
            parts.append([next(made) if k else [] for k in dl_sizes])
            assert next(made, None) is None
        for i, b in enumerate(whole):
            if len(b) < least*n: assert all(p[i] == b for p in parts)
            else: assert sum((p[i] for p in parts), []) == b
