"""StepLR against torch and the reference's log, and its manners beside everything else that trains or predicts"""
import copy
import csv
import inspect
import pickle
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, TrainEvalCallback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.learner import Learner, SkipToEpoch, load_learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastcore.basics import noop

from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.resume.saved import ResumeError
from s9_fastai.training.schedule import MODES, PlateauLR, StepLR, TriangularLR, lr_scheduler, lr_setters, stretches
from s9_fastai.test_utils import synth_dls, synth_groups, synth_learner, synth_model

nb = 2  # batches an epoch of `mk`


@pytest.fixture
def mk(tmp_path):
    "Make a quiet Learner with two batches an epoch"
    def _inner(*cbs, **kwargs):
        learn = synth_learner(synth_dls(32, path=tmp_path), cbs=list(cbs), **kwargs)
        learn.remove_cb(learn.progress)
        learn.logger = noop
        return learn
    return _inner


def torch_rates(bases, n, step_size, gamma):
    "The reference: the rates of each epoch, one per group, from torch's own scheduler"
    opt = torch.optim.SGD([{'params': [torch.zeros(1, requires_grad=True)], 'lr': b} for b in bases], lr=1.)
    sched, res = torch.optim.lr_scheduler.StepLR(opt, step_size, gamma), []
    for _ in range(n):
        res.append([g['lr'] for g in opt.param_groups])
        opt.step()
        sched.step()
    return res


def lrs(learn):
    "The recorded rate of each epoch, once it is sure that the recorder's two records agree and no epoch has two rates"
    res = learn.recorder.lrs
    assert learn.recorder.hps['lr'] == res
    assert [res[i] for i in range(0, len(res), nb) for _ in range(nb)] == res
    return res[::nb]


class Rates(Callback):
    "Note the rates of all groups at each batch, after every scheduler"
    order = 90
    def __init__(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen.append((self.epoch, [h['lr'] for h in self.opt.hypers]))


# -- equal to torch

@pytest.mark.parametrize('gamma', [0.1, 0.3, 0.5, 0.9, 1, 1.1])
@pytest.mark.parametrize('step', [1, 2, 3, 7, 20, 25, 29, 57, 100, 199, 200])
def test_rate_equals_torch(step, gamma):
    bases, sched = [0.05, 0.003, 1.], StepLR(step, gamma)
    assert [[sched.rate(b, e) for b in bases] for e in range(200)] == torch_rates(bases, 200, step, gamma)


def torch_warm_rates(bases, n, gamma, step_size=25, milestones=None, warmup=0, start_factor=1/3):
    "The same with milestones, and after a `LinearLR`"
    opt = torch.optim.SGD([{'params': [torch.zeros(1, requires_grad=True)], 'lr': b} for b in bases], lr=1.)
    make = torch.optim.lr_scheduler
    sched, res = make.MultiStepLR(opt, milestones, gamma) if milestones else make.StepLR(opt, step_size, gamma), []
    if warmup: sched = make.SequentialLR(opt, [make.LinearLR(opt, start_factor, total_iters=warmup), sched], [warmup])
    for _ in range(n):
        res.append([g['lr'] for g in opt.param_groups])
        opt.step()
        sched.step()
    return res


milestones_and_warmups = [dict(milestones=[30, 60, 80]), dict(milestones=(1, 2, 3)), dict(milestones=[150]), dict(milestones=[7], warmup=1),
                          dict(milestones=[30, 60, 80], warmup=5), dict(warmup=5), dict(warmup=29, start_factor=1.),
                          dict(step_size=7, warmup=10, start_factor=1e-3), dict(step_size=1, warmup=100, start_factor=0.1)]


@pytest.mark.parametrize('gamma', [0.1, 0.3, 1.1])
@pytest.mark.parametrize('kwargs', milestones_and_warmups, ids=str)
def test_milestones_and_warmup_equal_torch(kwargs, gamma):
    bases, sched = [0.05, 0.003, 1.], StepLR(gamma=gamma, **kwargs)
    assert [[sched.rate(b, e) for b in bases] for e in range(200)] == torch_warm_rates(bases, 200, gamma, **kwargs)


@pytest.mark.parametrize('kwargs', [dict(milestones=[2, 5], warmup=3, start_factor=0.1), dict(step_size=2, warmup=2)], ids=str)
def test_milestones_and_warmup_in_a_learner(mk, kwargs):
    ref = torch_warm_rates([0.01, 0.1], 10, 0.1, **kwargs)
    learn = mk(rates := Rates(), splitter=synth_groups)
    learn.fit_step(10, [0.01, 0.1], gamma=0.1, **kwargs)
    assert [r for _, r in rates.seen[::nb]] == ref
    rates.seen.clear()
    learn.fit_step(10, [0.01, 0.1], gamma=0.1, start_epoch=4, **kwargs)
    assert [r for _, r in rates.seen[::nb]] == ref[4:]


class Die(Exception): "In the middle of a run"


class Kill(Callback):
    "Ends a fit after the batches of one epoch, as if the process had been killed"
    at = None  # of the class, since what an instance has comes back with a checkpoint
    def after_train(self):
        if self.epoch == self.at: raise Die('killed')


@pytest.mark.parametrize('epoch', [1, 4])
def test_a_warm_up_and_milestones_resume(mk, tmp_path, monkeypatch, epoch):
    "In the middle of the warm-up, and after the first milestone; whatever the length, since nothing stretches"
    kwargs = dict(gamma=0.1, milestones=[2, 4], warmup=2)
    whole = mk(StepLR(**kwargs), seed=1)
    whole.fit(8, 0.1)
    learn, again = (mk(StepLR(**kwargs), Checkpoint(tmp_path/'run'), Kill(), seed=1) for _ in range(2))
    with monkeypatch.context() as m, pytest.raises(Die):
        m.setattr(Kill, 'at', epoch)
        learn.fit(5, 0.1)
    again.fit(8, 0.1)
    assert again.recorder.hps['lr'][-nb:] == whole.recorder.hps['lr'][-nb:] == [r for r, in torch_warm_rates([0.1], 8, **kwargs)[-1:]]*nb
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters()))
    assert not stretches([StepLR(**kwargs)])


@pytest.mark.parametrize('changed', [dict(milestones=[2, 5]), dict(warmup=1), dict(start_factor=0.5), dict(gamma=0.2)], ids=str)
def test_a_resume_with_another_schedule_is_refused_or_forced(mk, tmp_path, changed):
    kwargs = dict(gamma=0.1, milestones=[2, 4], warmup=2)
    now = {**kwargs, **changed}
    mk(StepLR(**kwargs), Checkpoint(tmp_path/'run')).fit(2, 0.1)
    with pytest.raises(ResumeError, match='callback step_lr was .*, is '): mk(StepLR(**now), Checkpoint(tmp_path/'run')).fit(8, 0.1)
    learn = mk(StepLR(**now), Checkpoint(tmp_path/'run', force=True))
    with pytest.warns(UserWarning, match='is resumed with changed settings'): learn.fit(8, 0.1)
    assert learn.recorder.hps['lr'][-1] == torch_warm_rates([0.1], 8, **now)[-1][0]


class DryLearner(Learner):
    "fastai's own training loop and events, with one batch an epoch that computes nothing"
    def _do_epoch_validate(self): pass
    def all_batches(self):
        self.n_iter = 1
        self._with_events(noop, 'batch', CancelBatchException)


def test_every_epoch_equals_torch_in_fits_of_many_lengths():
    step, gamma = 29, 0.1  # epoch 29 of 100 is one that a fraction gets wrong, and powers of 0.1 are not exact
    cbs = [TrainEvalCallback(), StepLR(step, gamma), rates := Rates()]
    dry = DryLearner(synth_dls(32), synth_model(), loss_func=noop, splitter=synth_groups, default_cbs=False, cbs=cbs)
    ref = torch_rates([0.01, 0.05], 200, step, gamma)
    for n in (*range(1, 31), 100, 199, 200):
        rates.seen.clear()
        dry.fit(n, lr=[0.01, 0.05])
        assert rates.seen == list(enumerate(ref[:n])), n


def test_fractions_of_pct_train_would_be_off_by_one():
    assert [e for e in range(100) if int(e/100 * 100) != e] == [29, 57, 58]
    assert StepLR(29).rate(1., 29) == StepLR(57).rate(1., 57) == StepLR(58).rate(1., 58) == 0.5


def test_power_of_gamma_would_not_equal_torch():
    ref = [r for r, in torch_rates([0.05], 200, 1, 0.1)]
    assert [0.05 * 0.1**e for e in range(200)] != ref


def test_rate_is_pure():
    sched = StepLR(2, 0.1)
    there, back = [sched.rate(0.05, e) for e in range(50)], [sched.rate(0.05, e) for e in reversed(range(50))]
    assert there == back[::-1]


# -- equal to the reference's log

def test_log_follows_step_20_and_not_25():
    rows = list(csv.DictReader((Path(__file__).parent/'data/s9-log.csv').open()))
    log = [(int(r['epoch']), float(r['lr_after_epoch'])) for r in rows]
    assert [e for e, _ in log] == list(range(1, 101))
    assert all(StepLR(20, 0.5).rate(0.05, e) == lr for e, lr in log)
    differ = [e for e, lr in log if StepLR(25, 0.5).rate(0.05, e) != lr]
    assert differ[0] == 20 and dict(log)[20] == 0.025
    assert dict(log)[80] == 0.003125 and dict(log)[100] == 0.0015625


# -- in a Learner

def test_recorded_and_plotted(mk):
    learn = mk(StepLR(2, 0.5))
    learn.fit(5, 0.1)
    assert lrs(learn) == [0.1, 0.1, 0.05, 0.05, 0.025]
    learn.recorder.plot_sched()
    assert list(plt.gca().lines[0].get_ydata()) == learn.recorder.lrs
    plt.close('all')


@pytest.mark.parametrize('lr, bases', [
    (slice(0.001, 0.1), [0.001, 0.1]), ([0.02, 0.3], [0.02, 0.3]), (0.1, [0.1, 0.1]), (slice(0.1), [0.01, 0.1])])
def test_each_group_keeps_its_own_base(mk, lr, bases):
    learn = mk(StepLR(1, 0.1), rates := Rates(), splitter=synth_groups)
    learn.fit(4, lr)
    assert rates.seen[0][1] == pytest.approx(bases)
    assert [r for _, r in rates.seen[::nb]] == torch_rates(rates.seen[0][1], 4, 1, 0.1)


def test_torch_optimizer_in_a_wrapper(mk):
    learn = mk(StepLR(1, 0.1), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), splitter=synth_groups)
    learn.fit(3, [0.01, 0.1])
    assert [g['lr'] for g in learn.opt.opt.param_groups] == torch_rates([0.01, 0.1], 3, 1, 0.1)[-1]


@pytest.mark.parametrize('k', range(6))
def test_start_epoch(mk, k):
    learn = mk(StepLR(2, 0.1))
    learn.fit(6, 0.1, start_epoch=k)
    assert lrs(learn) == [r for r, in torch_rates([0.1], 6, 2, 0.1)][k:]


def test_own_skip_and_restored_optimizer(mk):
    "A resumed run: a subclass of SkipToEpoch that also brings back an optimizer whose rate is already lowered"
    class Resume(SkipToEpoch):
        def before_fit(self): self.opt.load_state_dict(copy.deepcopy(self.state))
    first = mk(StepLR(2, 0.1))
    first.fit(3, 0.1)
    skip = Resume(3)
    skip.state = first.opt.state_dict()
    assert skip.state['hypers'][0]['lr'] == 0.1 * 0.1
    learn = mk(StepLR(2, 0.1))
    learn.fit(6, 0.1, cbs=skip)
    assert lrs(learn) == [r for r, in torch_rates([0.1], 6, 2, 0.1)][3:]


def test_each_fit_starts_again(mk):
    learn = mk(StepLR(1, 0.5), lr=0.08)
    learn.fit(3)
    assert learn.opt.hypers[0]['lr'] == 0.02  # left at the last rate
    learn.fit(3)
    assert lrs(learn) == [0.08, 0.04, 0.02]
    learn.fit(2, 0.1)
    assert lrs(learn) == [0.1, 0.05]
    learn.fit(2, reset_opt=True)
    assert lrs(learn) == [0.08, 0.04]


def test_cancelled_fit_is_recorded_and_leaves_no_trace(mk):
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch == 1: raise CancelFitException()
    learn = mk(StepLR(1, 0.5))
    learn.fit(5, 0.1, cbs=Stop())
    assert lrs(learn) == [0.1, 0.05]
    learn.fit(3, 0.1)
    assert lrs(learn) == [0.1, 0.05, 0.025]
    learn.fit(5, 0.1, cbs=EarlyStoppingCallback(min_delta=100.))
    assert lrs(learn) == [0.1, 0.05]


def test_freeze_and_unfreeze(mk):
    learn = mk(StepLR(1, 0.5), rates := Rates(), splitter=synth_groups)
    ref = torch_rates([0.02, 0.1], 3, 1, 0.5)
    for change in (learn.freeze, learn.unfreeze):
        rates.seen.clear()
        change()
        learn.fit(3, [0.02, 0.1])
        assert [r for _, r in rates.seen[::nb]] == ref


# -- beside the other schedules

def one_cycle(learn): learn.fit_one_cycle(3, 0.1)
def flat_cos(learn): learn.fit_flat_cos(3, 0.1)
def sgdr(learn): learn.fit_sgdr(1, 3, 0.1)
def fine_tune(learn): learn.fine_tune(2, 0.1)


@pytest.mark.parametrize('fit', [one_cycle, flat_cos, sgdr, fine_tune])
def test_steps_aside_for_the_scheduler_of_a_fit(mk, fit):
    plain, stepped = (mk(*cbs, splitter=synth_groups) for cbs in ([], [StepLR(1, 0.1)]))
    for learn in (plain, stepped):
        learn.fit(1)  # what it recorded here must not come back below
        fit(learn)
    assert stepped.recorder.lrs == plain.recorder.lrs
    assert stepped.recorder.hps == plain.recorder.hps and 'lr' in plain.recorder.hps
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), stepped.model.parameters()))
    stepped.validate()
    assert stepped.recorder.hps == plain.recorder.hps


def test_steps_aside_also_when_handed_to_fit_one_cycle(mk):
    plain, stepped = mk(), mk()
    plain.fit_one_cycle(3, 0.1)
    stepped.fit_one_cycle(3, 0.1, cbs=StepLR(1, 0.1))
    assert stepped.recorder.lrs == plain.recorder.lrs and stepped.recorder.hps == plain.recorder.hps


def test_works_beside_a_scheduler_of_something_else(mk):
    learn = mk(StepLR(1, 0.5))
    learn.fit(2, 0.1, cbs=ParamScheduler({'mom': SchedCos(0.9, 0.8)}))
    assert learn.recorder.lrs[::nb] == [0.1, 0.05]


def warm(): return ParamScheduler({'lr': SchedCos(0.01, 0.1)})


both = {  # callbacks of the Learner, callbacks of the fit, who sets the rate, who does nothing
    'attached': ([StepLR(1), warm()], [], ParamScheduler, StepLR), 'attached, the other way round': ([warm(), StepLR(1)], [], ParamScheduler, StepLR),
    'handed to one fit': ([], [StepLR(1), warm()], ParamScheduler, StepLR), 'handed to one fit, the other way round': ([], [warm(), StepLR(1)], ParamScheduler, StepLR),
    'steps for a fit of a Learner with another': ([warm()], [StepLR(1)], ParamScheduler, StepLR),
    'two of ours attached': ([StepLR(1), TriangularLR()], [], TriangularLR, StepLR), 'two of ours in one fit': ([], [TriangularLR(), StepLR(1)], StepLR, TriangularLR),
    'a plateau attached': ([PlateauLR(), StepLR(1)], [], StepLR, PlateauLR), "fastai's plateau": ([StepLR(1)], [ReduceLROnPlateau()], StepLR, ReduceLROnPlateau),
    "fastai's plateau attached": ([ReduceLROnPlateau(), TriangularLR()], [], TriangularLR, ReduceLROnPlateau)}


@pytest.mark.parametrize('what', both)
def test_two_that_set_the_rate_are_named(mk, fault, what):
    attached, brought, setter, idle = both[what]
    learn = mk(*attached)
    with pytest.warns(UserWarning, match=f'{setter.__name__} sets the learning rate of this fit, so {idle.__name__} does nothing: take one of them out') as found:
        learn.fit(2, 0.1, cbs=brought)
    assert len(found) == 1
    if what == 'attached': fault('training', 'two schedules in one fit', found[0].message)
    done = next(cb for cb in [*attached, *brought] if type(cb) is setter)
    alone = mk(done)
    alone.fit(2, 0.1)
    assert learn.recorder.hps['lr'] == alone.recorder.hps['lr']


@pytest.mark.parametrize('attached', [StepLR(1), TriangularLR(), PlateauLR()], ids=lambda cb: cb.name)
@pytest.mark.parametrize('do', [
    one_cycle, flat_cos, sgdr, fine_tune, lambda learn: learn.fit(2), lambda learn: learn.fit_step(2), lambda learn: learn.fit(2, cbs=StepLR(1)),
    lambda learn: learn.fit(2, cbs=warm()), lambda learn: learn.fit(2, start_epoch=1, cbs=TriangularLR()), Learner.validate, Learner.get_preds,
    lambda learn: learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None), lambda learn: learn.fit(1, cbs=ParamScheduler({'mom': SchedCos(0.9, 0.8)}))])
def test_a_fit_may_bring_its_own_without_a_warning(mk, attached, do):
    learn = mk(attached, splitter=synth_groups)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        do(learn)


def test_lr_find_is_left_alone(mk):
    plain, stepped = mk(), mk(StepLR(1, 0.1))
    for learn in (plain, stepped):
        learn.fit(2, 0.1)
        learn.lr_find(num_it=20, show_plot=False, stop_div=False)
    assert stepped.recorder.lrs == plain.recorder.lrs and len(plain.recorder.lrs) == 20
    stepped.fit(3, 0.1)
    assert lrs(stepped) == [r for r, in torch_rates([0.1], 3, 1, 0.1)]


def test_broken_off_lr_find_does_not_switch_it_off(mk):
    class Break(Callback):
        def after_batch(self): raise KeyboardInterrupt
    learn = mk(StepLR(1, 0.5))
    with learn.added_cbs(Break()), pytest.raises(KeyboardInterrupt): learn.lr_find(show_plot=False)
    learn.fit(3, 0.1)
    assert lrs(learn) == [0.1, 0.05, 0.025]


def test_the_last_step_lr_wins(mk):
    class Name(Callback):
        def after_train(self): self.step_size = self.step_lr.step_size
    learn = mk(StepLR(1, 0.1), name := Name())
    learn.fit(3, 0.1, cbs=StepLR(2, 0.5))
    assert lrs(learn) == [0.1, 0.1, 0.05] and name.step_size == 2
    learn.fit(3, 0.1)
    assert name.step_size == 1
    assert lrs(learn) == [r for r, in torch_rates([0.1], 3, 1, 0.1)]


# -- outside of training

def test_predicting_leaves_the_records(mk):
    learn = mk(StepLR(1, 0.5))
    learn.fit(3, 0.1)
    hps = copy.deepcopy(learn.recorder.hps)
    for use in (learn.validate, learn.get_preds, learn.tta):
        use()
        assert learn.recorder.hps == hps and learn.opt.hypers[0]['lr'] == 0.025, use


@pytest.mark.parametrize('use', ['validate', 'get_preds'])
def test_validating_inside_a_fit_does_not_move_the_base(mk, use):
    class Nested(Callback):
        def after_train(self): getattr(self.learn, use)(dl=self.dls.valid)
    learn = mk(StepLR(1, 0.5), rates := Rates())
    learn.remove_cb(learn.recorder)  # fastai's own Recorder does not survive this
    learn.fit(4, 0.1, cbs=Nested())
    assert rates.seen[-1][1] == [0.0125]
    assert learn.step_lr.hps['lr'] == [0.1]*nb + [0.05]*nb + [0.025]*nb + [0.0125]*nb


def test_predicting_needs_no_optimizer(mk):
    for use in ('validate', 'get_preds', 'tta'):
        learn = mk(StepLR())
        assert learn.opt is None
        getattr(learn, use)()
        assert not hasattr(learn.recorder, 'hps')


def test_export_and_load(mk):
    learn = mk(StepLR(1, 0.5), splitter=synth_groups)
    learn.fit(2, 0.1)
    learn.export('export.pkl')
    with pytest.warns(UserWarning, match='pickle'): loaded = load_learner(learn.path/'export.pkl')
    assert torch.equal(loaded.get_preds(dl=learn.dls.valid)[0], learn.get_preds()[0])
    loaded.dls, loaded.logger = learn.dls, noop
    loaded.fit(3, 0.1)
    assert lrs(loaded) == [0.1, 0.05, 0.025]


def test_copies(mk):
    for make in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o, protocol=2))):
        learn = mk(make(StepLR(2, 0.5)))
        learn.fit(3, 0.1)
        assert lrs(learn) == [0.1, 0.1, 0.05]


# -- fit_step

def test_fit_step(mk):
    learn = mk(lr=0.08)
    learn.fit_step(3, step_size=1)
    assert lrs(learn) == [0.08, 0.04, 0.02]
    learn.fit_step(4, 0.1, step_size=2, gamma=0.1, start_epoch=1, wd=0.01)
    assert lrs(learn) == [r for r, in torch_rates([0.1], 4, 2, 0.1)][1:]
    assert learn.opt.hypers[0]['wd'] == 0.01
    assert not lr_setters(learn)
    opt = learn.opt
    learn.fit_step(1, reset_opt=True)
    assert learn.opt is not opt


@pytest.mark.parametrize('cb', [StepLR(1, 0.1), ParamScheduler({'lr': SchedCos(1., 0.)})])
def test_fit_step_wins_over_what_is_attached(mk, cb):
    learn = mk(cb)
    learn.fit_step(3, 0.1, step_size=2, gamma=0.5)
    assert lrs(learn) == [0.1, 0.1, 0.05]
    assert list(lr_setters(learn)) == [cb] and cb.learn is learn and getattr(learn, cb.name) is cb


def test_fit_step_puts_the_attached_one_back_after_an_error(mk):
    class Fail(Callback):
        def after_batch(self): raise RuntimeError('no')
    learn = mk(cb := StepLR(1, 0.1))
    with pytest.raises(RuntimeError): learn.fit_step(3, cbs=Fail())
    assert list(lr_setters(learn)) == [cb]


def test_defaults_have_one_home():
    ref = inspect.signature(StepLR).parameters
    for f in (Learner.fit_step, lr_scheduler):
        for name in ('step_size', 'gamma', 'milestones', 'warmup', 'start_factor'): assert inspect.signature(f).parameters[name].default == ref[name].default


# -- errors

@pytest.mark.parametrize('value', [0, -1, 2.5, 25., True, '25', None])
def test_bad_step_size(mk, value):
    msg = rf'step_size is {value!r}, but must be (a whole number, )?at least 1'
    with pytest.raises(ValueError, match=msg): StepLR(value)
    with pytest.raises(ValueError, match=msg): mk().fit_step(1, step_size=value)


@pytest.mark.parametrize('value', [0, -0.5, float('inf'), float('nan'), True, '0.5', None, 1j])
def test_bad_gamma(value):
    with pytest.raises(ValueError) as e: StepLR(25, value)
    is_number = isinstance(value, (int, float)) and value is not True
    assert str(e.value) == f'gamma is {value!r}, but must be ' + ('above 0' if is_number else 'a number, above 0')


@pytest.mark.parametrize('value', [(), (30, 20), (5, 5), (0, 3), (2.5,), [True], 30, 'ab', {}])
def test_bad_milestones(value):
    with pytest.raises(ValueError, match='milestones? is .*(one or more epochs in increasing order, such as|at least 1)'): StepLR(milestones=value)


def test_steps_are_even_or_at_milestones():
    with pytest.raises(ValueError, match='step_size is 10 and milestones are .30, 60.: give one of them'): StepLR(10, milestones=(30, 60))


@pytest.mark.parametrize('kwargs, msg', [(dict(warmup=-1), 'warmup is -1, but must be at least 0'), (dict(warmup=2.), 'warmup is 2.0'),
                                         (dict(warmup=True), 'warmup is True'), (dict(start_factor=0), 'start_factor is 0, but must be above 0 and up to 1'),
                                         (dict(start_factor=1.1), 'start_factor is 1.1'), (dict(start_factor=float('nan')), 'start_factor is nan')])
def test_bad_warmups(kwargs, msg):
    with pytest.raises(ValueError, match=msg): StepLR(**kwargs)


@pytest.mark.parametrize('kwargs', [{}, dict(milestones=(30,)), dict(warmup=40)])
def test_whole_epochs_only(kwargs):
    with pytest.raises(TypeError): StepLR(**kwargs).rate(0.05, 0.29*100)


def test_bad_modes():
    with pytest.raises(ValueError, match="mode is 'cosine', but must be 'step', 'triangle', 'plateau' or 'none'"): lr_scheduler('cosine')
    with pytest.raises(ValueError, match="mode is .'step'., but must be 'step'"): lr_scheduler(['step'])
    with pytest.raises(ValueError, match='patience is 0, but must be at least 1'): lr_scheduler('plateau', patience=0)
    with pytest.raises(ValueError, match="gamma of mode 'plateau' is 1.0, but must be above 0 and below 1"): lr_scheduler('plateau', gamma=1.)
    for mode in MODES:
        with pytest.raises(ValueError, match='step_size is 0'): lr_scheduler(mode, step_size=0)
        if mode == 'step': continue
        for k, v in dict(milestones=(3,), warmup=5, start_factor=0.1).items():
            with pytest.raises(ValueError, match=f"{k} is .*, but mode is '{mode}': give it with mode 'step' only"): lr_scheduler(mode, **{k: v})


# -- plateau and none

def test_modes(mk):
    learn = mk(*lr_scheduler('none'))
    learn.fit(3, 0.1)
    assert set(learn.recorder.lrs) == {0.1}
    learn = mk(*lr_scheduler('step', step_size=2, gamma=0.1))
    learn.fit(3, 0.1)
    assert lrs(learn) == [r for r, in torch_rates([0.1], 3, 2, 0.1)]
    cb, = lr_scheduler('plateau', gamma=0.25, patience=3)
    assert isinstance(cb, PlateauLR) and (cb.factor, cb.patience, cb.monitor) == (4, 3, 'valid_loss')


class FakeLoss(Callback):
    "Put `losses` in the place of the validation losses of a fit"
    order = ReduceLROnPlateau.order - 5
    def __init__(self, losses): self.losses = losses
    def after_epoch(self):
        row = self.recorder.values[-1]
        if len(row) > 1: row[1] = self.losses[self.epoch]


def torch_plateau(losses, **kwargs):
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    sched, res = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, threshold=0, **kwargs), []
    for loss in losses:
        res.append(opt.param_groups[0]['lr'])
        sched.step(loss)
    return res


@pytest.mark.parametrize('patience', [0, 1, 5])
def test_plateau_equals_torch(mk, patience):
    losses = [5, 4, 4, 4.5, 4, 3] + [3]*16
    ref = torch_plateau(losses, factor=0.5, patience=patience)
    assert len(set(ref)) > 2
    learn = mk(*lr_scheduler('plateau', patience=patience + 1), FakeLoss(losses))
    learn.fit(len(losses), 0.1)
    assert learn.recorder.lrs[::nb] == ref


def test_attached_plateau_survives_all_that_is_not_a_whole_epoch(mk):
    for metrics in ([], [accuracy]):
        learn = mk(PlateauLR(), metrics=metrics)
        learn.validate()
        learn.get_preds()
        learn.fit(3, 0.1, start_epoch=2)
        learn.validate()
        assert learn.opt.hypers[0]['lr'] == 0.1


def test_predicting_does_not_restart_the_plateau_watch(mk):
    learn = mk(cb := PlateauLR(patience=100))
    learn.fit(1)
    cb.wait, cb.best = 7, 1.5  # as in the middle of a fit
    learn.get_preds()
    assert (cb.wait, cb.best) == (7, 1.5)


def test_plateau_steps_aside(mk, capsys):
    learn = mk(PlateauLR(), FakeLoss([1.]*9))
    learn.fit_one_cycle(4, 0.1)
    learn.fit_step(4, 0.1)
    assert 'reducing' not in capsys.readouterr().out
    assert lrs(learn) == [0.1]*4
    learn.lr_find(num_it=6, show_plot=False)
    learn.fit(3, 0.1)
    assert learn.recorder.lrs[::nb] == pytest.approx([0.1, 0.1, 0.01])


def test_broken_off_lr_find_does_not_switch_plateau_off(mk):
    class Break(Callback):
        def after_batch(self): raise KeyboardInterrupt
    learn = mk(PlateauLR(), FakeLoss([1.]*9))
    with learn.added_cbs(Break()), pytest.raises(KeyboardInterrupt): learn.lr_find(show_plot=False)
    learn.fit(3, 0.1)
    assert learn.recorder.lrs[::nb] == pytest.approx([0.1, 0.1, 0.01])


def test_plateau_refuses_what_it_cannot_change(mk):
    learn = mk(PlateauLR(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    with pytest.raises(TypeError, match="opt is an OptimWrapper: .* use SGD"): learn.fit(1)


# -- the triangle

def test_a_look_at_the_validation_set_in_an_epoch_moves_no_rate(mk):
    "`validate` in a callback sets the Learner's epoch to 0 until the next one begins"
    class Look(Callback):
        order = 50
        def after_batch(self):
            if self.training and self.iter == 0 and not self.lock.locked():
                self.learn.validate()
                self.learn.training = True
    for sched in (lambda: StepLR(1, 0.5), TriangularLR):
        rates = []
        for cbs in ((), (Look(),)):
            learn = mk(sched(), *cbs)
            learn.fit(3, 0.1)
            rates.append(learn.recorder.hps['lr'])
        assert rates[0] == rates[1]


def test_a_triangle_stretches_and_makes_way(mk):
    for n in (1, 2, 7):
        learn = mk(TriangularLR(0.25))
        learn.fit(n, 0.2)
        rates = learn.recorder.hps['lr']
        assert rates[0] == 0 and max(rates) <= 0.2 and len(rates) == n*len(learn.dls.train)
        np.testing.assert_allclose(rates, [TriangularLR(0.25).rate(0.2, i/len(rates)) for i in range(len(rates))], rtol=1e-12)
    plain = mk()
    for o in (plain, learn): o.fit_one_cycle(2, 0.1)
    assert plain.recorder.hps['lr'] == learn.recorder.hps['lr']


@pytest.mark.parametrize('pct_start', [-0.1, 1, 1.5, float('nan'), True, None, '0.2'])
def test_bad_warm_ups(pct_start):
    with pytest.raises(ValueError, match='pct_start is .*, but must be (a number, )?0 to below 1'): TriangularLR(pct_start)
    with pytest.raises(ValueError, match='pct_start is'): lr_scheduler('triangle', pct_start=pct_start)
