"The faults of training: a message that says what happened and what to do, all that was there before is whole, and going on ends as if nothing had happened"
import gc
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastcore.basics import noop
from PIL import Image
from processes import Script, bin
from test_cifar import tiny_arrays, write_fastai

from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.training.guards import FiniteLoss
from s9_fastai.app.command import plain_message
from s9_fastai.cifar.loaders import cifar_block
from s9_fastai.data.arrays import ArrayDL
from s9_fastai.core.events import in_fit
from s9_fastai.core.files import replacing
from s9_fastai.report.mistakes import plot_misclassified
from s9_fastai.report.plots import plot_curves
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.nets.net import Net
from s9_fastai.training.record import EpochRecorder, RunLog
from s9_fastai.resume.saved import read_checkpoint
from s9_fastai.core.weights import save_weights
from s9_fastai.test_utils import synth_cifar, synth_images
from s9_fastai.app.train import main_train

pytestmark = [pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no SIGKILL and no limit of file sizes'), pytest.mark.usefixtures('no_pictures_in_module')]
epoch_re = re.compile(r'EPOCH: \d+\nLoss=\S+ Batch_id=\d+ Accuracy=\S+\n\nTest set: Average loss: \S+, Accuracy: \d+/\d+ \(\S+%\)\n\nLearning rate: \S+\n')
nothing = 'no message: '  # for the faults that do no harm


def tiny_dls(bs=10, n=40, num_workers=0, drop_last=False):
    "`n` training and 20 test images: four training batches and two of validation"
    data = synth_cifar(n, 20)
    return cifar_block(data).dataloaders(range(n + 20), bs=bs, seed=1, num_workers=num_workers, device='cpu', drop_last=drop_last)


def mk(run_dir, dls=None, seed=0, recipe=get_recipe(n_channels=4, step_size=2, compute='plain'), **kwargs):
    "A quiet, small Learner of the package"
    set_seed(seed)
    learn = s9_learner(dls or tiny_dls(), recipe, run_dir, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def outcome(learn, run_dir):
    "All that must be the same in the end"
    history = pd.read_csv(run_dir/'history.csv', dtype=str).drop(columns='time').to_csv()
    return {k: v.tolist() for k, v in learn.model.state_dict().items()}, (run_dir/'log.txt').read_text(), history, [*map(list, learn.recorder.values)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Three epochs without a fault"
    run_dir = tmp_path_factory.mktemp('whole')
    learn = mk(run_dir)
    learn.fit(3)
    return outcome(learn, run_dir)


def assert_all_is_whole(run_dir, epochs=None):
    "Whole epochs in the log, checkpoints that are sound and finite, nothing temporary"
    log = (run_dir/'log.txt').read_text() if (run_dir/'log.txt').exists() else ''
    assert epoch_re.sub('', log) == '' and epochs in (None, log.count('EPOCH'))
    states = [read_checkpoint(p) for p in (run_dir/'checkpoints').glob('*.safetensors')]
    assert states and all(v.isfinite().all() for s in states for v in s['model'].values())
    assert not [p for p in run_dir.rglob('.*')]


def assert_it_goes_on(run_dir, whole, learn=None, seed=9):
    "The Learner that met the fault, if there is one, and then a new one: both end like the run that never failed"
    if learn is not None:
        learn.fit(3)
        assert outcome(learn, run_dir) == whole
    again = mk(run_dir, seed=seed)
    again.fit(3)
    assert outcome(again, run_dir) == whole


@pytest.fixture
def before(monkeypatch):
    "A function of (class, method, when, do): once `when(self, *args)` is true, `do` runs before that method, a single time"
    def inner(cls, name, when, do):
        real, done = getattr(cls, name), []
        def wrapped(self, *args, **kwargs):
            if not done and when(self, *args):
                done.append(True)
                do()
            return real(self, *args, **kwargs)
        monkeypatch.setattr(cls, name, wrapped)
    return inner


def message(kind, f, *args, **kwargs):
    "The message of the error that `f` ends with"
    with pytest.raises(kind) as e: f(*args, **kwargs)
    return plain_message(e.value)


def command(*args, cwd):
    "`s9_train` on the sample, in batches of 250"
    return Script(bin/'s9_train', '--data', 'sample', '--recipe', 'stated', '--bs', 250, '--norm', 'ln', *args, cwd=cwd)


def one_line(p, code):
    "The line that the script `p` ends with"
    done = p.end()
    err = done.stderr
    assert done.returncode == code, err
    assert err.count('\n') == 1 and err.startswith('s9_train: '), err
    return err


@pytest.fixture
def here(monkeypatch, capsys):
    "The command in this process: a function of its options that gives exit code, output and complaints"
    def inner(*args):
        monkeypatch.setattr(sys, 'argv', ['s9_train', *map(str, args)])
        code = 0
        try: main_train()
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    return inner


# A disk that is full

class Tmpfs:
    "A small disk of its own"
    def __init__(self, folder):
        self.ballast = folder/'ballast'
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', folder], check=True, capture_output=True)
    def leave(self, n):
        "Fill all but `n` bytes, in pages"
        st = os.statvfs(self.ballast.parent)
        self.ballast.write_bytes(bytes(st.f_bavail*st.f_bsize - n))
    def free(self): self.ballast.unlink()
    def close(self): subprocess.run(['umount', '-l', self.ballast.parent], check=True)


class Limit:
    "No file may have more than so many bytes: what is beyond them cannot be written, as on a disk that is full"
    def __init__(self, folder=None): self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
    def leave(self, n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, self.before[1]))
    def free(self): resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
    close = free


@pytest.fixture
def disk(tmp_path):
    "A disk in the folder `disk` that can be filled: one of its own where that is allowed, else a limit"
    (tmp_path/'disk').mkdir()
    try: disk = Tmpfs(tmp_path/'disk')
    except (OSError, subprocess.CalledProcessError): disk = Limit()
    yield disk
    disk.close()


@pytest.fixture
def limit():
    limit = Limit()
    yield limit
    limit.close()


def is_epoch(n): return lambda self, *args: self.epoch == n and in_fit(self.learn)
def is_place(n): return lambda self, place, *args: place.epoch == n
def is_file(nm, epoch): return lambda self, name, *args: (name, self.epoch) == (nm, epoch)


@pytest.mark.parametrize('at', [0, 1, 2, 3])
def test_a_disk_that_is_full_at_a_checkpoint(tmp_path, disk, before, whole, fault, at):
    run_dir = tmp_path/'disk'/'run'
    before(Checkpoint, 'save', is_place(at), lambda: disk.leave(0))
    learn = mk(run_dir)
    msg = message(OSError, learn.fit, 3)
    assert f'{at:05d}-train' in msg
    disk.free()
    if at: assert_all_is_whole(run_dir, at)  # the line of the epoch is there, its checkpoint is not
    assert_it_goes_on(run_dir, whole, learn if at % 2 else None, seed=9 if at else 0)  # at 0 there is nothing yet to go on from
    if at == 1: fault('training', 'a disk that is full at a checkpoint', msg)


@pytest.mark.parametrize('nm, epoch', [('log.txt', 0), ('history.csv', 0)])
def test_a_disk_that_is_full_at_the_first_lines(tmp_path, disk, before, whole, nm, epoch):
    run_dir = tmp_path/'disk'/'run'
    before(RunLog, 'append', is_file(nm, epoch), lambda: disk.leave(0))
    learn = mk(run_dir)
    assert f'{nm} cannot be written' in message(OSError, learn.fit, 3)
    disk.free()
    assert_all_is_whole(run_dir, 0 if nm == 'log.txt' else 1)
    assert_it_goes_on(run_dir, whole, learn)


@pytest.mark.parametrize('nm', ['log.txt', 'history.csv'])
def test_a_disk_that_is_full_in_the_middle_of_a_line(tmp_path, limit, before, whole, fault, nm):
    "Three bytes of it fit"
    before(RunLog, 'append', is_file(nm, 1), lambda: limit.leave((tmp_path/nm).stat().st_size + 3))
    learn = mk(tmp_path)
    msg = message(OSError, learn.fit, 3)
    limit.free()
    assert_all_is_whole(tmp_path, 1 if nm == 'log.txt' else 2)
    assert (tmp_path/'history.csv').read_text().count('\n') == 2
    assert_it_goes_on(tmp_path, whole, learn)
    fault('training', f'a disk that is full at a line of {nm}', msg)


def test_a_disk_that_is_full_at_the_end(tmp_path, disk, whole, fault):
    "Weights and figures: those that were there before stay"
    run_dir = tmp_path/'disk'/'run'
    learn = mk(run_dir)
    learn.fit(3)
    writers = {'weights.safetensors': lambda p: save_weights(learn.model, p), 'curves.png': lambda p: plot_curves(run_dir/'history.csv', p),
               'misclassified.png': lambda p: plot_misclassified(learn, path=p)}
    for nm, write in writers.items(): write(run_dir/nm)
    disk.leave(0)
    msgs = {nm: message(OSError, write, run_dir/nm) for nm, write in writers.items()}
    disk.free()
    for nm, msg in msgs.items(): fault('training', f'a disk that is full at {nm}', msg)
    assert_all_is_whole(run_dir, 3)
    for nm in ('curves.png', 'misclassified.png'): Image.open(run_dir/nm).load()
    assert outcome(learn, run_dir) == whole


def test_the_command_on_a_disk_that_is_full(tmp_path, disk, fault, here):
    "The first checkpoint fits, the second, which has momentum too, does not"
    run_dir = tmp_path/'disk'/'run'
    disk.leave(600_000)
    msg = one_line(command('--epochs', 1, '--out', run_dir, cwd=tmp_path), 1)
    disk.free()
    fault('training', 's9_train on a disk that is full', msg)
    assert_all_is_whole(run_dir, 1)
    assert [p.name[:8] for p in (run_dir/'checkpoints').glob('*.safetensors')] == ['00-00000']
    code, out, err = here('--resume', run_dir)
    assert (code, err) == (0, '') and 'resuming from the start' in out
    assert_all_is_whole(run_dir, 1)


# A folder that disappears

@pytest.mark.parametrize('what', ['the folder of a run', 'the folder of checkpoints'])
def test_a_folder_that_disappears(tmp_path, before, whole, fault, what):
    run_dir, kept = tmp_path/'runs'/'run', tmp_path/'kept'
    gone = run_dir if what == 'the folder of a run' else run_dir/'checkpoints'
    before(RunLog, 'after_epoch', lambda self: self.epoch == 1 and self.recorder.trained, lambda: gone.rename(kept))
    learn = mk(run_dir)
    msg = message(OSError, learn.fit, 3)
    assert f'{gone} does not exist: restore it and try again' in msg and gone.exists() is False
    fault('training', f'{what} that disappears', msg)
    kept.rename(gone)
    assert_all_is_whole(run_dir, 1 if gone == run_dir else 2)
    assert_it_goes_on(run_dir, whole, learn)


def test_the_command_whose_folder_disappears(tmp_path, before, here, fault):
    run_dir, kept = tmp_path/'runs'/'run', tmp_path/'kept'
    before(RunLog, 'after_epoch', lambda self: self.epoch == 1 and self.recorder.trained, lambda: run_dir.rename(kept))
    code, _, err = here('--data', 'sample', '--recipe', 'stated', '--bs', 500, '--epochs', 2, '--norm', 'ln', '--n-channels', 4, '--out', run_dir)
    assert code == 1 and err.count('\n') == 1 and not run_dir.exists()
    fault('training', 's9_train whose folder disappears', err)
    assert_all_is_whole(kept, 1)
    kept.rename(run_dir)
    assert here('--resume', run_dir)[::2] == (0, '')
    assert_all_is_whole(run_dir, 2)


def test_a_file_in_the_place_of_the_folder(tmp_path, fault):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'checkpoints').write_text('precious')
    fault('training', 'a file in the place of the folder of checkpoints', message(OSError, mk(tmp_path/'run').fit, 1))
    assert (tmp_path/'run'/'checkpoints').read_text() == 'precious'
    with pytest.raises(OSError, match='cannot be written'), replacing(tmp_path/'run'/'checkpoints'/'x') as f: f.write_text('x')


# Workers

def children(pid): return [int(d.name) for d in Path('/proc').iterdir() if d.name.isdigit() and parent(d) == pid]


def parent(d):
    try: return int((d/'stat').read_text().rsplit(')', 1)[1].split()[1])
    except OSError: return None  # it has ended


def assert_no_worker_is_left():
    gc.collect()  # an error holds what was under way when it came
    assert eventually(lambda: not multiprocessing.active_children())


def no_pid(msg):
    "Without what differs from one time to the next: torch may notice a dead worker in two ways"
    return re.sub(r'pid(\(s\))? [\d, ]+', 'pid …', msg).replace('is killed by signal: Killed.', 'exited unexpectedly')


def is_gone(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return True


def eventually(f, seconds=20):
    end = time.time() + seconds
    while not f() and time.time() < end: time.sleep(0.05)
    return f()


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='needs the list of processes of Linux')
def test_the_command_whose_worker_is_killed(tmp_path, fault, here):
    p = command('--epochs', 50, '--n-channels', 4, '--workers', 2, '--out', tmp_path/'run', cwd=tmp_path)
    p.wait_for('epoch   1')
    workers = set()
    while p.returncode is None and len(workers) < 40:  # one that has handed in its last batch is not missed
        for pid in children(p.pid)[-1:]:
            workers.update(children(p.pid))
            os.kill(pid, signal.SIGKILL)
        p.p.join(0.7)
    msg = one_line(p, 1)
    assert 'worker' in msg and f's9_train --resume {tmp_path}/run' in msg
    assert eventually(lambda: all(map(is_gone, workers)))
    assert_all_is_whole(tmp_path/'run')
    fault('training', 's9_train whose worker is killed', no_pid(msg))
    n = (tmp_path/'run'/'log.txt').read_text().count('EPOCH')
    code, out, err = here('--resume', tmp_path/'run', '--epochs', n + 1, '--workers', 0)
    assert (code, err) == (0, '') and f'resuming from the end of epoch {n}' in out
    assert_all_is_whole(tmp_path/'run', n + 1)


def kill_a_worker():
    # the one that made the first batch; the other may have no batch left and be leaving by itself, which is no fault
    first = min(multiprocessing.active_children(), key=lambda o: int(o.name.rpartition('-')[2]))
    os.kill(first.pid, signal.SIGKILL)
    time.sleep(5)  # until the signal that tells of it


@pytest.mark.parametrize('training', [True, False])
def test_a_worker_that_is_killed(tmp_path, before, whole, fault, training):
    before(Checkpoint, 'after_batch', lambda self: (self.epoch, self.training, self.iter) == (1, training, 0), kill_a_worker)
    learn = mk(tmp_path, tiny_dls(num_workers=2))
    msg = message(RuntimeError, learn.fit, 3)
    fault('training', 'a worker that is killed', no_pid(msg))
    assert_all_is_whole(tmp_path, 1)
    assert_it_goes_on(tmp_path, whole, learn)
    del learn
    assert_no_worker_is_left()


def no_memory(): raise MemoryError


def only_in_worker(f, at):
    "`direct_batch` with `f` before it, in a worker that has made a batch in epoch `at`"
    real, made = ArrayDL.direct_batch, []
    def wrapped(self, chunk):
        if torch.utils.data.get_worker_info() is not None and self.epoch == at and self.shuffle and made: f()
        made.append(1)  # each worker has a list of its own
        return real(self, chunk)
    return wrapped


def test_a_worker_without_memory(tmp_path, monkeypatch, whole, fault):
    with monkeypatch.context() as m:
        m.setattr(ArrayDL, 'direct_batch', only_in_worker(no_memory, 1))
        learn = mk(tmp_path, tiny_dls(num_workers=1))
        msg = message((MemoryError, RuntimeError, OSError), learn.fit, 3)
    fault('training', 'a worker without memory', no_pid(msg))
    assert_all_is_whole(tmp_path, 1)
    assert_it_goes_on(tmp_path, whole, learn)
    del learn
    assert_no_worker_is_left()


# A loss that is no number

def test_a_loss_that_is_no_number(tmp_path, fault, whole):
    "The line of the second epoch says where; a lower rate, forced, goes on from the first"
    mk(tmp_path).fit(1)
    before = (tmp_path/'log.txt').read_text()
    learn = mk(tmp_path, force=True)
    with pytest.warns(UserWarning, match=r'lr was \[0.05\], is \[1e\+30\]'): msg = message(FloatingPointError, learn.fit, 3, lr=1e30)
    assert re.match('the loss is (nan|inf) in training batch [1-4] of epoch 2, where', msg)
    fault('training', 'a loss that is no number', msg)
    assert (tmp_path/'log.txt').read_text() == before
    assert_all_is_whole(tmp_path, 1)
    assert_it_goes_on(tmp_path, whole, mk(tmp_path, force=True))


def test_the_command_with_a_rate_that_is_too_high(tmp_path, fault, here):
    "What it says next to a rate is true: with a lower one it goes on"
    # the decay multiplies the weights by -30 in each step, so that it ends within a few of the 20 whatever the machine computes
    options = '--bs', 100, '--epochs', 1, '--norm', 'ln', '--n-channels', 4, '--wd', 0.031, '--lr', 999
    code, _, err = here('--data', 'sample', '--recipe', 'stated', *options, '--out', tmp_path/'run')
    assert code == 1 and err.count('\n') == 1 and f'--resume {tmp_path}/run --force --lr ' in err
    fault('training', 's9_train with a rate that is too high', re.sub(r'batch \d+', 'batch 4', err))
    assert_all_is_whole(tmp_path/'run', 0)
    code, out, err = here('--resume', tmp_path/'run', '--force', '--lr', 0.01)
    assert code == 0 and 'lr 0.01 ' in out and 'lr was [999.0], is [0.01]' in err


@pytest.mark.parametrize('sched, lrs', [('step', [0.05, 0.001, 0.0001]), ('none', [0.05, 0.01, 0.01]), ('plateau', [0.05, 0.01, 0.01]),
                                        ('triangle', [0.05*0.25/0.8, 0.01*(1.25/3)/0.8, 0.01*(0.25/3)/0.8])])
def test_what_is_forced_is_done(tmp_path, sched, lrs):
    "Rates, momentum, decay and steps that come back with the state give way to those of the Learner that goes on"
    recipe = dict(n_channels=4, compute='plain', sched=sched)
    then, now = (dict(step_size=2), dict(step_size=1, gamma=0.1)) if sched == 'step' else ({}, {})
    mk(tmp_path, recipe=get_recipe(**recipe, **then)).fit(1)
    learn = mk(tmp_path, recipe=get_recipe(**recipe, **now, mom=0.5, lr=0.01, wd=0.1), force=True)
    with pytest.warns(UserWarning, match='is resumed with changed settings'): learn.fit(3)
    np.testing.assert_allclose([o[-1] for o in learn.recorder.values], lrs)
    hypers = learn.opt.hypers[0]
    assert (hypers['mom'], hypers['wd'], learn.n_epoch) == (0.5, 0.1, 3)
    np.testing.assert_allclose(hypers['lr'], lrs[-1])


def spoil(what):
    def f():
        with torch.no_grad(): what[0].model.fc.bias[0] = float('inf')
    return f


spoilt = {'a loss that is no number in validation only': (FiniteLoss, 'after_loss', lambda cb: not cb.training, 'validation batch 1 of epoch 2'),
          'weights that the last step of an epoch spoils': (Checkpoint, 'after_batch', lambda cb: cb.training and cb.iter == 3, 'validation batch 1 of epoch 2'),
          'weights that are spoilt after the validation': (RunLog, 'after_epoch', lambda cb: True, 'fc.bias is not finite at the end of epoch 2')}


@pytest.mark.parametrize('what', spoilt)
def test_spoilt(tmp_path, before, whole, fault, what):
    cls, method, when, part = spoilt[what]
    learn = mk(tmp_path)
    do = spoil([learn])
    if cls is FiniteLoss: do = lambda: setattr(learn, 'loss', learn.loss*float('nan'))
    before(cls, method, lambda cb: cb.epoch == 1 and when(cb), do)
    msg = message(FloatingPointError, learn.fit, 3)
    assert part in msg
    fault('training', what, msg)
    assert_all_is_whole(tmp_path, 2 if cls is RunLog else 1)
    assert_it_goes_on(tmp_path, whole, learn)


def test_lr_find_may_diverge(tmp_path, whole):
    "It looks for the rate at which the loss is no number any more, and leaves no trace in the run folder"
    learn = mk(tmp_path)
    learn.lr_find(end_lr=1e30, num_it=40, stop_div=False, show_plot=False, suggest_funcs=None)
    assert not np.isfinite(torch.stack(learn.recorder.losses)).all()
    assert not any(tmp_path.iterdir())
    learn.fit(1)
    assert_all_is_whole(tmp_path, 1)


# Sizes

def test_a_batch_larger_than_the_data(tmp_path, fault):
    learn = mk(tmp_path/'run', tiny_dls(bs=100))
    learn.fit(2)
    assert len(learn.recorder.losses) == 2
    fault('training', 'a batch larger than the data', nothing + 'it has all images')
    fault('training', 'a batch larger than the data, incomplete ones left out', message(ValueError, mk, None, tiny_dls(bs=100, drop_last=True)))


def test_one_image_in_the_last_batch(tmp_path, fault):
    fault('training', 'one image in the last batch', message(ValueError, mk, tmp_path/'run', tiny_dls(bs=13)))
    assert not (tmp_path/'run').exists()
    for recipe, drop_last in ((get_recipe(norm='gn', n_channels=4), False), (get_recipe(n_channels=4), True)):
        mk(None, tiny_dls(bs=13, drop_last=drop_last), recipe=recipe).fit(1)
    mk(None, tiny_dls(bs=19)).fit(1)  # one image in the last batch of validation


def test_a_folder_of_one_class(tmp_path, fault, here):
    data = write_fastai(tmp_path/'data', tiny_arrays(10))
    for d in data.glob('*/*'):
        if d.is_dir() and d.name != 'cat': shutil.rmtree(d)
    code, _, err = here('--data', data, '--out', tmp_path/'run')
    assert code == 2 and not (tmp_path/'run').exists()
    fault('training', 'a folder of one class', err)


def test_a_net_of_one_class(tmp_path, fault):
    "There is nothing to learn, and it trains all the same"
    images = synth_images(40)[0]
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: PILImage.create(images[i]), get_y=lambda i: 'cat', splitter=IndexSplitter(range(20, 40)))
    learn = Learner(block.dataloaders(range(40), bs=10, device='cpu'), Net(4, n_classes=1), CrossEntropyLossFlat(), metrics=accuracy,
                    cbs=[FiniteLoss(), RunLog(tmp_path), Checkpoint(tmp_path)])
    learn.remove_cbs([learn.recorder, ProgressCallback])
    learn.add_cb(EpochRecorder()).logger = noop
    learn.fit(2)
    assert learn.validate()[1] == 1
    assert_all_is_whole(tmp_path, 2)
    fault('training', 'a net of one class', nothing + 'its loss is 0')
