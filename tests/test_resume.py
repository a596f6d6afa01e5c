"A fit that is broken off anywhere and taken up again ends as if nothing had happened: in one process, and as the command that is killed"
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.torch_core import set_seed
from fastcore.foundation import L
from processes import Script, bin, quick_train, run
from test_images import train_killed
from torch.optim.swa_utils import AveragedModel

from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.cifar.loaders import cifar_block
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.resume.learner import SkipTo
from s9_fastai.resume.saved import ResumeError, Place, newest_checkpoint
from s9_fastai.core.signals import Stopped
from s9_fastai.training.ema import EMA
from s9_fastai.training.record import EpochRecorder, RunLog
from s9_fastai.test_utils import quiet, synth_cifar, synth_dls, synth_learner

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'benchmarks'/'trust'))
import kill


def tiny_dls(policy='reference', augment='item', bs=10, num_workers=0, seed=1):
    "40 training and 20 test images: 4 training batches and 2 of validation"
    data = synth_cifar(40, 20)
    return cifar_block(data, policy, augment).dataloaders(range(60), bs=bs, seed=seed, num_workers=num_workers, device='cpu', drop_last=False)


class Break(Callback):
    "Breaks a fit off with an error, or sends a signal, at `at`: (fit, epoch, training?, batch)"
    order, at, send, fits, not_saved = 2000, None, None, 0, True
    def before_fit(self):
        if not self.lock.locked() and not hasattr(self.learn, 'lr_finder'): Break.fits += 1
    def is_there(self, event_of_signal):
        if self.at != (Break.fits - 1, self.epoch, self.training, self.iter) or self.lock.locked(): return False
        if (self.send is None) == event_of_signal: return False
        Break.at = None
        return True
    def after_loss(self):
        if self.is_there(True): signal.raise_signal(self.send)
    def after_batch(self):
        if self.is_there(False): raise SystemError('broken off')


def plain_learner(run_dir, seed=0, dls=None, cbs=(), recipe=None, **kwargs):
    "A Learner of the package, with small layers"
    set_seed(seed)
    recipe = recipe or get_recipe(n_channels=4, step_size=2, compute='plain')
    return quiet(s9_learner(dls or tiny_dls(), recipe, run_dir, cbs=[Break(), *cbs], path=run_dir.parent, **kwargs))


def known(learn, run_dir):
    "All that must be the same in the end"
    state = [p.detach().flatten() for p in learn.model.state_dict().values()]
    rec = learn.recorder
    files = [(run_dir/'log.txt').read_text(), pd.read_csv(run_dir/'history.csv', dtype=str).drop(columns='time').to_csv()] if (run_dir/'log.txt').exists() else []
    opt = [s[k] for s in learn.opt.state_dict()['state'] for k in sorted(s)] if not isinstance(learn.opt, OptimWrapper) else []
    return torch.cat([o.double() for o in state]), plain(rec.values), plain(rec.lrs), plain(rec.losses), rec.iters, opt, files


def plain(o): return [plain(v) for v in o] if isinstance(o, (list, L)) else float(o)


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    assert repr(a[1:5]) == repr(b[1:5]) and a[6] == b[6]
    for x, y in zip(a[5], b[5]): assert x.equal(y) if isinstance(x, torch.Tensor) else x == y


def fit3(learn): learn.fit(3, 0.1)


def check(tmp_path, places, make=plain_learner, fit=fit3, **kwargs):
    "A whole run, and one that is broken off at each of `places` in turn; both end the same"
    Break.at, Break.fits = None, 0
    whole = make(tmp_path/'whole'/'run', **kwargs)
    fit(whole)
    for i, place in enumerate([*places, None]):
        Break.at, Break.fits = place, 0
        learn = make(tmp_path/'broken'/'run', seed=i, **kwargs)  # after the first, other weights, which the checkpoint replaces
        if place is None: fit(learn)
        else:
            with pytest.raises((SystemError, Stopped)): fit(learn)
            assert Break.at is None, 'it never came to that place'
    assert_same(known(whole, tmp_path/'whole'/'run'), known(learn, tmp_path/'broken'/'run'))
    return whole, learn


everywhere = [(0, e, t, b) for e in range(3) for t, n in ((True, 4), (False, 2)) for b in range(n)]


@pytest.mark.parametrize('every', [None, 1, 3])
def test_an_error_at_each_batch_of_a_run(tmp_path, every):
    check(tmp_path, everywhere, save_every=every)


@pytest.mark.parametrize('num', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_each_batch_of_a_run(tmp_path, num, monkeypatch):
    "The batch is finished and saved, in validation too, so that no batch is done twice"
    monkeypatch.setattr(Break, 'send', num)
    done = []
    class Count(Callback):
        def after_loss(self):
            if not self.lock.locked(): done.append((self.epoch, self.training, self.iter))
    check(tmp_path, everywhere, cbs=[Count()])
    n = len(done)//2
    assert sorted(done[n:]) == sorted(done[:n]) and len(set(done)) == n


averaged = dict(n_channels=4, opt='muon', sched='triangle', ema=0.2, label_smoothing=0.1, wd=0.01, compute='plain')


@pytest.mark.parametrize('num, places', [(None, everywhere[2:8]), (signal.SIGTERM, everywhere[3:14:2])])
def test_an_end_in_training_and_validation_with_averages(tmp_path, num, places, monkeypatch):
    "In validation the averages are where the weights were"
    monkeypatch.setattr(Break, 'send', num)
    check(tmp_path, places, recipe=get_recipe(**averaged), save_every=3)


@pytest.mark.parametrize('opt', ['nesterov', 'muon'])
def test_the_optimizers_of_recipes(tmp_path, opt):
    check(tmp_path, [(0, 1, True, 2)], recipe=get_recipe(**{**averaged, 'opt': opt, 'ema': 0.}), save_every=1)


@pytest.mark.parametrize('augment, workers, compute', [('item', 2, 'plain'), ('batch', 0, 'fast'), ('batch', 1, 'plain'), ('item', 0, 'fast')])
def test_ways_of_a_run(tmp_path, augment, workers, compute):
    recipe = get_recipe(n_channels=4, step_size=2, compute=compute, augment=augment)
    def make(run_dir, **kwargs): return plain_learner(run_dir, dls=tiny_dls(augment=augment, num_workers=workers), recipe=recipe, **kwargs)
    check(tmp_path, [(0, 0, True, 2), (0, 1, True, 2), (0, 2, True, 0), (0, 2, False, 1)], make, save_every=1)


def test_the_number_of_workers_may_change_on_the_way(tmp_path):
    n = iter([0, 2, 1, 0])
    def make(run_dir, **kwargs): return plain_learner(run_dir, dls=tiny_dls(num_workers=next(n)), **kwargs)
    check(tmp_path, [(0, 0, True, 2), (0, 1, True, 1)], make, save_every=1)


class Scaled(Callback):
    "What mixed precision and averaging keep: objects with a state dict of their own, tensors, a counter"
    def before_fit(self):
        self.scaler = torch.amp.GradScaler('cpu', init_scale=2., growth_interval=3)
        self.ema, self.n, self.mean = AveragedModel(self.model, avg_fn=lambda a, p, n: 0.9*a + 0.1*p), 0, torch.zeros(2)
    def before_backward(self): self.learn.loss_grad = self.scaler.scale(self.loss_grad)
    def before_step(self):
        for p in self.model.parameters(): p.grad /= self.scaler.get_scale()
    def after_step(self):
        self.scaler._growth_tracker = None if self.scaler._scale is None else self.scaler._growth_tracker
        self.ema.update_parameters(self.model)
        self.n += 1
        self.mean += self.n*torch.rand(2)


class Noise(Callback):
    "Draws from every global random generator"
    def after_backward(self):
        for p in self.model.parameters(): p.grad += 0.01*(torch.rand(1).item() + np.random.rand() + random.random())


def one_cycle(learn): learn.fit_one_cycle(3, 0.1)
def two_fits(learn):
    learn.freeze()
    learn.fit_one_cycle(2, 0.1)
    learn.unfreeze()
    learn.fit(2, slice(0.01, 0.1))
def between(learn):
    "What people do in a notebook between two fits, and in a callback"
    learn.fit(2, 0.1)
    learn.validate(), learn.get_preds(), learn.lr_find(num_it=5, show_plot=False)
    learn.fit(2, 0.05)


@pytest.mark.parametrize('cbs, fit', [
    (lambda: [MixUp(0.4)], fit3), (lambda: [CutMix()], fit3), (lambda: [GradientAccumulation(25), GradientClip(0.1)], fit3), (lambda: [Noise()], fit3),
    (lambda: [Scaled()], fit3), (lambda: [], one_cycle), (lambda: [SaveModelCallback(fname='best'), EarlyStoppingCallback(patience=1)], partial(Learner.fit, n_epoch=3, lr=3.)),
    (lambda: [ReduceLROnPlateau(patience=1, factor=2)], fit3)],
    ids=['mixup', 'cutmix', 'accumulation', 'all generators', 'scaler and average', 'one cycle', 'early stopping', 'plateau'])
def test_what_fastai_offers_is_taken_up_too(tmp_path, cbs, fit):
    own = 'none' if any(isinstance(cb, ReduceLROnPlateau) for cb in cbs()) else 'step'  # of two schedules one would be ignored
    recipe = get_recipe(n_channels=4, sched=own, compute='plain')
    def make(run_dir, **kwargs): return plain_learner(run_dir, cbs=cbs(), recipe=recipe, **kwargs)
    check(tmp_path, [(0, 0, True, 2), (0, 1, True, 1), (0, 1, False, 0)], make, fit, save_every=1)


def test_what_callbacks_keep_is_the_same(tmp_path):
    def make(run_dir, **kwargs): return plain_learner(run_dir, cbs=[Scaled()], **kwargs)
    a, b = check(tmp_path, [(0, 1, True, 2)], make, save_every=1)
    assert a.scaled.n == b.scaled.n == 12 and torch.equal(a.scaled.mean, b.scaled.mean) and a.scaled.scaler.state_dict() == b.scaled.scaler.state_dict()
    for p, q in zip(a.scaled.ema.parameters(), b.scaled.ema.parameters()): assert torch.equal(p, q)


def groups(m): return [list(m.conv1.parameters()), [p for nm, p in m.named_parameters() if not nm.startswith('conv1.')]]


@pytest.mark.parametrize('fit', [two_fits, between])
def test_several_fits_of_one_learner(tmp_path, fit):
    "Broken off in the second one; in the new process the first one is passed over"
    check(tmp_path, [(0, 1, True, 1), (1, 0, True, 2), (1, 1, False, 0)], fit=fit, splitter=groups, save_every=1)


def torch_opt(params, lr, **kwargs): return OptimWrapper(params, torch.optim.AdamW, lr=lr)


@pytest.mark.parametrize('opt', [SGD, partial(Adam, wd=0.1), torch_opt], ids=['SGD', 'Adam', "torch's AdamW"])
def test_optimizers(tmp_path, opt):
    check(tmp_path, [(0, 0, True, 2), (0, 2, True, 1)], opt_func=opt, save_every=1)


def test_loaders_of_fastai_go_on_at_the_last_epoch(tmp_path):
    "They cannot begin in the middle of one: after a signal there, the epoch is repeated"
    def make(run_dir, seed=0): return quiet(synth_learner(synth_dls(seed=0), seed=seed, cbs=[Break(), Checkpoint(run_dir)]))
    check(tmp_path, [(0, 0, True, 2), (0, 1, True, 2), (0, 2, False, 0)], make)
    with pytest.raises(ValueError, match='every is 2, but these loaders cannot begin in the middle'):
        fit3(quiet(synth_learner(cbs=Checkpoint(tmp_path/'c', every=2))))


def test_a_signal_ends_in_a_line_that_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(Break, 'send', signal.SIGTERM)
    Break.at, Break.fits = (0, 1, True, 2), 0
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match='stopped by SIGTERM, saved in .*run at batch 3 of the training of epoch 2') as e: fit3(plain_learner(tmp_path/'run'))
    assert e.value.signum == signal.SIGTERM and before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_the_same_learner_goes_on_after_a_signal(tmp_path, monkeypatch):
    "As in a notebook: interrupted, then the cell is run again"
    whole = plain_learner(tmp_path/'a'/'run')
    fit3(whole)
    monkeypatch.setattr(Break, 'send', signal.SIGINT)
    Break.at, Break.fits = (0, 1, True, 2), 0
    learn = plain_learner(tmp_path/'b'/'run')
    with pytest.raises(KeyboardInterrupt): fit3(learn)
    fit3(learn)
    assert_same(known(whole, tmp_path/'a'/'run'), known(learn, tmp_path/'b'/'run'))
    fit3(learn)  # and a further fit begins anew, as ever
    assert list(pd.read_csv(tmp_path/'b'/'run'/'history.csv').epoch) == [1, 2, 3, 4, 5, 6]


def test_only_the_last_two_are_kept_and_nothing_else_is_touched(tmp_path):
    (tmp_path/'run'/'checkpoints').mkdir(parents=True)
    for nm in ('notes.txt', '.123-00-00001-train-000000.safetensors'): (tmp_path/'run'/'checkpoints'/nm).touch()
    fit3(plain_learner(tmp_path/'run', save_every=2))
    names = sorted(p.name for p in (tmp_path/'run'/'checkpoints').iterdir() if p.name != 'lock')
    assert names == ['00-00002-train-000004.safetensors', '00-00003-train-000000.safetensors', 'notes.txt']


def test_a_complete_run_is_left_as_it_is(tmp_path, capsys):
    fit3(plain_learner(tmp_path/'run'))
    files = {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}
    learn = plain_learner(tmp_path/'run', seed=5)
    fit3(learn)
    assert {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()} == files and len(learn.recorder.values) == 3
    assert 'this fit is complete' in capsys.readouterr().out


def test_a_fit_that_is_killed_after_its_last_epoch(tmp_path, monkeypatch):
    "All is saved but the word that it is complete, which comes later, and stands behind the last epoch"
    def save(self, place, done=False, save=Checkpoint.save):
        if done: raise SystemError('gone')
        save(self, place)
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'save', save)
        with pytest.raises(SystemError): fit3(plain_learner(tmp_path/'run'))
    for _ in range(2): fit3(plain_learner(tmp_path/'run', seed=5))
    assert {p.name.split('-train')[0] for p in (tmp_path/'run'/'checkpoints').glob('*.safetensors')} <= {'00-00002', '00-00003'}
    state, _ = newest_checkpoint(tmp_path/'run')
    assert (state['done'], state['place']) == (True, Place(3, 'train', 0))


def test_a_forced_fit_with_nothing_left_to_train_is_refused_and_changes_nothing(tmp_path):
    fit3(plain_learner(tmp_path/'run'))
    files = {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}
    with pytest.raises(ResumeError, match='they would change nothing: set them back, or take more epochs'): plain_learner(tmp_path/'run', force=True).fit(3, 0.2)
    assert {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()} == files


def test_a_step_schedule_can_be_made_longer(tmp_path):
    learn = plain_learner(tmp_path/'a'/'run')
    learn.fit(4, 0.1)
    fit3(plain_learner(tmp_path/'b'/'run'))
    longer = plain_learner(tmp_path/'b'/'run', seed=4)
    longer.fit(4, 0.1)
    assert_same(known(learn, tmp_path/'a'/'run'), known(longer, tmp_path/'b'/'run'))


changed = {'lr': (dict(), lambda learn: learn.fit(3, 0.2)), 'wd': (dict(), lambda learn: learn.fit(3, 0.1, wd=0.1)),
           'n_epoch': (dict(), one_cycle), 'bs': (dict(dls=lambda: tiny_dls(bs=8)), fit3), 'after_item': (dict(dls=lambda: tiny_dls('none')), fit3),
           'step_size': (dict(recipe=get_recipe(n_channels=4, step_size=3, compute='plain')), fit3), 'callback mix_up': (dict(cbs=[MixUp()]), fit3),
           'optimizer': (dict(opt_func=SGD), fit3), 'n_channels': (dict(recipe=get_recipe(n_channels=6, step_size=2, compute='plain')), fit3)}


@pytest.mark.parametrize('name', changed)
def test_a_change_is_named_and_refused(tmp_path, name):
    "And nothing is lost: set back, the run goes on"
    kwargs, fit = changed[name]
    kwargs = {k: v() if k == 'dls' else v for k, v in kwargs.items()}
    first = (lambda learn: learn.fit_one_cycle(4, 0.1)) if name == 'n_epoch' else fit3
    Break.at, Break.fits = (0, 1, True, 2), 0
    with pytest.raises(SystemError): first(plain_learner(tmp_path/'run'))
    files = {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}
    with pytest.raises(ResumeError, match=f'settings have changed since the run stopped: .*{name} was .*, is '): fit(plain_learner(tmp_path/'run', **kwargs))
    assert {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()} == files
    first(plain_learner(tmp_path/'run'))


def test_a_version_that_changed_is_named_and_refused(tmp_path, monkeypatch):
    fit3(plain_learner(tmp_path/'run'))
    import s9_fastai.resume.settings as module
    told = module.environment()
    monkeypatch.setattr(module, 'environment', lambda: {**told, 'torch': '1.0'})
    with pytest.raises(ResumeError, match='torch was .*, is 1.0'): plain_learner(tmp_path/'run').fit(4, 0.1)
    with pytest.warns(UserWarning, match='is resumed with changed settings: torch was'): plain_learner(tmp_path/'run', force=True).fit(4, 0.1)


def test_a_display_may_change(tmp_path):
    Break.at, Break.fits = (0, 1, True, 2), 0
    with pytest.raises(SystemError): fit3(plain_learner(tmp_path/'run'))
    learn = plain_learner(tmp_path/'run', cbs=[ProgressCallback()])
    with learn.no_bar(): fit3(learn)


def test_fewer_epochs_than_there_were_are_refused(tmp_path):
    fit3(plain_learner(tmp_path/'run'))
    with pytest.raises(ResumeError, match='n_epoch was 3, is 2'): plain_learner(tmp_path/'run').fit(2, 0.1)


def test_a_folder_with_a_history_and_no_checkpoint_is_refused(tmp_path):
    "As a run folder that was cleaned up: its log is not to be mixed with that of another run"
    fit3(plain_learner(tmp_path/'run'))
    for p in (tmp_path/'run'/'checkpoints').glob('0*'): p.unlink()
    text = (tmp_path/'run'/'log.txt').read_text()
    with pytest.raises(ResumeError, match='has the history of a run, but no checkpoint'): fit3(plain_learner(tmp_path/'run'))
    assert (tmp_path/'run'/'log.txt').read_text() == text


def test_every_must_count_batches(tmp_path):
    for bad in (0, -1, 2.5, True, 'x'):
        with pytest.raises(ValueError, match='every is .*: give a whole number of at least 1, or None'): Checkpoint(tmp_path, every=bad)


def test_skipped_epochs_are_used_by_by_nobody():
    "Unlike with fastai's SkipToEpoch"
    noted = []
    class Hear(Callback):
        def __call__(self, event):
            if self.run: noted.append((event, getattr(self.learn, 'epoch', None)))
    learn = quiet(synth_learner(cbs=[Hear(), SkipTo(Place(2, 'train', 0))]))
    noted.clear()
    learn.fit(4)
    assert {e for event, e in noted if 'fit' not in event} == {2, 3} and [e for e, _ in noted].count('after_epoch') == 2


def test_the_pause_is_no_part_of_the_epochs_time(tmp_path, monkeypatch):
    Break.at, Break.fits = (0, 1, True, 2), 0
    with pytest.raises(SystemError): fit3(plain_learner(tmp_path/'run', save_every=1))
    import s9_fastai.resume.checkpoint as module
    real = module.time.time
    class Later:
        @staticmethod
        def time(): return real() + 3600
    monkeypatch.setattr(module, 'time', Later)
    monkeypatch.setattr('fastai.learner.time', Later)
    monkeypatch.setattr('s9_fastai.training.record.time', Later)
    fit3(plain_learner(tmp_path/'run', save_every=1))
    assert set(pd.read_csv(tmp_path/'run'/'history.csv').time.str[:3]) == {'00:'}


# The command

def test_killed_in_a_write(tmp_path):
    "Half of a checkpoint is left; the long form of this test is below"
    args = '--data', 'sample', '--epochs', 2, '--bs', 250, '--save-every', 3, '--n-channels', 4, '--compute', 'plain', '--augment', 'item'
    whole = train_killed(tmp_path/'whole', *args)
    assert train_killed(tmp_path/'killed', *args, kills=[('in a write', 3)]) == whole


@pytest.mark.slow
def test_killed_six_times(monkeypatch):
    "Each kind, at new moments and in other variants each time; benchmarks/trust/kill.py does it twenty times and keeps what it found"
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    found = list(kill.trials(6, epochs=2, bs=250, seed=os.urandom(8).hex(), variants=random.sample(kill.VARIANTS, 2)))
    assert [o['same'] for o in found] == [True]*6 and {o['kind'] for o in found} == {*kill.KINDS}, found


short_run = '--data', 'sample', '--epochs', 1, '--bs', 500, '--n-channels', 4


def trained(folder, *args):
    "The fingerprint of a short run with the options `args`, in a process of its own"
    done = run(quick_train, *short_run, *args, '--out', folder)
    assert done.returncode == 0, done.stderr
    return kill.fingerprint(folder)


@pytest.mark.parametrize('augment, workers', [('item', (0, 2)), ('batch', (0, 1))])
def test_workers_and_processes_give_the_same_hash(tmp_path, augment, workers):
    assert len({trained(tmp_path/str(w), '--augment', augment, '--workers', w, '--compute', 'plain') for w in workers}) == 1


def test_deterministic_is_told_and_changes_nothing_on_a_cpu(tmp_path):
    assert trained(tmp_path/'b', '--deterministic') == trained(tmp_path/'a')
    assert '"deterministic": true' in (tmp_path/'b'/'recipe.json').read_text()


@pytest.mark.parametrize('num, code', [('SIGINT', 130), ('SIGTERM', 143)])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_signal_ends_the_command_in_good_order(tmp_path, num, code, workers):
    args = '--data', 'sample', '--epochs', 40, '--bs', 100, '--n-channels', 4, '--workers', workers, '--out', tmp_path/'run'
    p = Script(bin/'s9_train', *args, is_group=True)
    p.wait_for('epoch   1')
    os.killpg(p.pid, getattr(signal, num))  # a terminal's Ctrl-C and a batch system's SIGTERM go to the workers too
    done = p.end()
    err = done.stderr
    assert done.returncode == code and err.count('\n') == 1 and err.startswith(f's9_train: stopped by {num}, saved in '), err
    assert err.endswith(f's9_train --resume {tmp_path/"run"}\n') and newest_checkpoint(tmp_path/'run')[0]['done'] is False


def fit_around(folder, between=None):
    "Weights and rows of a fit of two epochs; before it and after it, `between` of the Learner is called"
    set_seed(0)
    learn = quiet(synth_learner(cbs=[EpochRecorder(), EMA(0.2), RunLog(folder), Checkpoint(folder)]))
    if between: getattr(learn, between)()
    learn.fit(2)
    rows, files = [[*row] for row in learn.recorder.values], {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
    weights = [p.detach().clone() for p in learn.model.parameters()]
    if between: getattr(learn, between)()
    assert files == {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
    return weights, [row[:-1] for row in rows], learn


@pytest.mark.parametrize('between', ['summary', 'tta', 'validate', 'get_preds'])
def test_other_calls_are_no_part_of_a_run(tmp_path, between):
    "They have the events of a fit, before there is an optimizer and after a run is complete"
    weights, rows, _ = fit_around(tmp_path/'alone')
    again, rows_again, learn = fit_around(tmp_path/'beside', between)
    assert all(map(torch.equal, again, learn.model.parameters())) and len(rows) == len(rows_again) == 2
    if between in ('validate', 'get_preds'): assert all(map(torch.equal, weights, again)) and rows == rows_again  # the others draw training batches
