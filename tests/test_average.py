"The moving average of the weights beside what else a Learner may be asked to do"
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.text.models.awdlstm import WeightDropout
from fastai.torch_core import set_seed
from fastcore.basics import noop
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from s9_fastai.training.ema import EMA
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.test_utils import synth_dls, synth_groups, synth_learner


class Keep(Callback):
    "The weights after each step, and while the model is validated"
    order = 21
    def before_fit(self):
        if not self.lock.locked(): self.steps, self.valid = [], []
    def after_step(self): self.steps.append(weights(self.learn))
    def before_validate(self): self.valid.append(weights(self.learn))


def weights(learn): return torch.cat([p.detach().flatten().clone() for p in learn.model.parameters()])


def quiet(learn):
    learn.logger = noop
    return learn


def mean_so_far(steps): return torch.stack(steps).mean(0)


def mk(age=0.5, cbs=(), **kwargs): return quiet(synth_learner(cbs=[EMA(age), Keep(), *cbs], **kwargs))


def test_each_validation_and_the_end_have_the_average():
    learn = mk()
    learn.fit(3)
    n = len(learn.dls.train)
    for e, found in enumerate(learn.keep.valid): torch.testing.assert_close(found, mean_so_far(learn.keep.steps[:n*(e + 1)]))
    torch.testing.assert_close(weights(learn), mean_so_far(learn.keep.steps))


def test_only_steps_count():
    "With gradients that are summed over two batches there are half as many"
    learn = mk(cbs=[GradientAccumulation(n_acc=32)])
    learn.fit(2)
    assert len(learn.keep.steps) == len(learn.dls.train)
    torch.testing.assert_close(weights(learn), mean_so_far(learn.keep.steps))


def test_a_second_fit_begins_anew_from_the_average():
    learn = mk()
    learn.fit(1)
    first = weights(learn)
    learn.fit(1, lr=1e-9)
    torch.testing.assert_close(weights(learn), first, atol=1e-6, rtol=1e-5)


def test_a_look_in_between_is_at_the_weights_that_learn():
    class Look(Callback):
        order, seen = 30, ()
        def after_batch(self):
            if not self.training or self.iter != 1 or self.lock.locked(): return
            self.learn.validate()
            self.seen = [*self.seen, weights(self.learn)]
            self.model.train()  # fastai leaves it in evaluation mode
            self.learn.training = True
    learn = mk(cbs=[Look()])
    learn.fit(2)
    n = len(learn.dls.train)
    for e, found in enumerate(learn.look.seen): assert found.equal(learn.keep.steps[n*e + 1])


def test_validate_and_lr_find_outside_of_a_fit(tmp_path):
    learn = mk(path=tmp_path)
    learn.fit(1)
    before, last = weights(learn), learn.keep.steps[-1]
    learn.validate(), learn.lr_find(num_it=5, show_plot=False)
    kept = torch.cat([p.flatten() for p in learn.ema.learning])  # the weights that learnt
    assert weights(learn).equal(before) and kept.equal(last) and learn.ema.is_out


def test_the_model_that_is_saved_is_the_one_that_was_validated(tmp_path):
    learn = mk(cbs=[SaveModelCallback(every_epoch=True)], path=tmp_path)
    learn.fit(2)
    for e, valid in enumerate(learn.keep.valid):
        found = torch.load(tmp_path/'models'/f'model_{e}.pth', weights_only=True)
        assert torch.cat([found[k].flatten() for k, _ in learn.model.named_parameters()]).equal(valid)


def test_running_statistics_are_averaged_and_counters_are_not():
    set_seed(0)
    class Statistics(Callback):
        order, seen = 21, []
        def after_step(self): self.seen.append([o.clone() for o in self.learn.model.buffers()])
    recipe, cbs = get_recipe(n_channels=4, sched='none', compute='plain'), [EMA(0.5), Statistics()]
    learn = quiet(s9_learner(synth_dls(64), recipe, cbs=cbs))
    learn.fit(2)
    assert len(cbs[1].seen) == learn.model.conv1.norm.num_batches_tracked == 8
    for found, seen in zip(learn.model.buffers(), zip(*cbs[1].seen), strict=True):
        torch.testing.assert_close(found, mean_so_far(seen) if found.is_floating_point() else seen[-1])


class Hidden(nn.Module):
    "A network on 4 numbers with a layer that is special"
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 10)

    def forward(self, x): return self.head(self.layer(x.mean((2, 3))))


class Weird(nn.Linear):
    "Buffers of every kind: a mask with infinities, a counter, a statistic that is put there anew each time, a constant of 64 bits"
    def __init__(self):
        super().__init__(3, 6)
        for k, v in dict(mask=torch.tensor([0., -torch.inf]), count=torch.tensor(0), stat=torch.zeros(3), const=torch.ones(2, dtype=torch.float64)).items():
            self.register_buffer(k, v)

    def forward(self, x):
        if self.training: self.count, self.stat = self.count + 1, self.stat + x.detach().mean(0)
        return super().forward(x) + self.mask[0] + self.const[0].float()


class Turned(nn.Module):
    "Complex weights"
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, dtype=torch.complex64))

    def forward(self, x): return (x.to(torch.complex64)@self.weight).abs()


class LowPrecision(nn.Linear):
    "Weights of 16 bits"
    def forward(self, x): return super().forward(x.to(self.weight.dtype)).float()


def recurrent():
    lstm = WeightDropout(nn.LSTM(3, 6), 0.5)
    class Rnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = lstm
        def forward(self, x): return self.rnn(x[None])[0][0]
    return Rnn()


def tied():
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    return nn.Sequential(nn.Linear(3, 6), a, b)


layers = dict(
    plain=lambda: nn.Linear(3, 6), norm=lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)), recurrent=recurrent, tied=tied, weird=Weird, turned=Turned,
    old_spectral=lambda: nn.utils.spectral_norm(nn.Linear(3, 6)), old_weight=lambda: nn.utils.weight_norm(nn.Linear(3, 6)),
    spectral=lambda: parametrizations.spectral_norm(nn.Linear(3, 6)), weight=lambda: parametrizations.weight_norm(nn.Linear(3, 6)),
    lazy=lambda: nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d()), bfloat16=lambda: LowPrecision(3, 6, dtype=torch.bfloat16))


class KeepAll(Callback):
    "The parameters and buffers after each step, by name"
    order = 21
    def before_fit(self): self.steps = []
    def after_step(self):
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.steps.append({k: t.detach().clone() for k, t in named})


def by_hand(steps):
    "What a plain mean leaves under each name"
    for k, t in steps[-1].items():
        seen = torch.stack([s[k] for s in steps])
        averaged = (t.is_floating_point() or t.is_complex()) and seen.isfinite().all()
        yield k, seen.to(torch.complex128 if t.is_complex() else torch.float64).mean(0).to(t.dtype) if averaged else t


def special(name, cbs=(), **kwargs):
    torch.manual_seed(0)
    return quiet(synth_learner(model=Hidden(layers[name]()), cbs=[EMA(0.5), KeepAll(), *cbs], **kwargs))


@pytest.mark.filterwarnings('ignore')  # of torch, that the old norms are old
@pytest.mark.parametrize('name', layers)
def test_any_layer_has_its_mean(name):
    learn = special(name)
    with learn.no_bar(): learn.fit(2)
    found = learn.model.state_dict(keep_vars=True)
    assert len(learn.keep_all.steps) == 8
    for k, want in by_hand(learn.keep_all.steps):
        tol = dict(rtol=2e-2, atol=1e-3) if want.dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[k].detach(), want, **tol)
    with learn.no_bar(): assert np.isfinite(learn.validate()[0])


def test_16_bits_do_not_round_a_small_step_away():
    "A weight that moves by 1 each time, far from 0 in steps of bfloat16: its mean over 200 steps is exact before the last rounding"
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    cb, w = EMA(0.5), model.weight.data
    cb.learn = SimpleNamespace(model=model, lock=threading.Lock())
    w.fill_(0)
    cb.before_fit()
    for _ in range(200):
        w += 1
        cb.after_step()
    assert cb.avg[0].dtype == torch.float32 and cb.avg[0].item() == pytest.approx(100.5, rel=1e-5)
    cb.before_validate()
    assert w.item() == 100.5 and w.dtype == torch.bfloat16
    cb.before_train()
    assert w.item() == 200


@pytest.mark.parametrize('age', [0.1, 0.5])
def test_it_is_torchs_averaged_model_for_a_plain_network(age):
    "Bit for bit, buffers included"
    class Theirs(Callback):
        order = 22
        def before_fit(self): self.avg = AveragedModel(self.model, multi_avg_fn=self.lerp, use_buffers=True)
        def lerp(self, avgs, news, n):
            if not avgs[0].is_floating_point(): return [a.copy_(b) for a, b in zip(avgs, news)]
            torch._foreach_lerp_(avgs, news, 1 - (1 - 1/(n.item() + 1))**(1/age - 1))
        def after_step(self): self.avg.update_parameters(self.model)
    set_seed(0)
    recipe = get_recipe(n_channels=4, sched='none', compute='plain')
    learn = quiet(s9_learner(synth_dls(64), recipe, cbs=[EMA(age), Theirs()]))
    with learn.no_bar(): learn.fit(3)
    want = learn.theirs.avg.module.state_dict()
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, want[k]), k


def test_freezing_within_a_fit():
    class Thaw(Callback):
        def before_train(self):
            if not self.lock.locked(): self.learn.freeze() if self.epoch == 0 else self.learn.unfreeze()
    learn = mk(cbs=[Thaw()], splitter=synth_groups)
    with learn.no_bar(): learn.fit(2)
    torch.testing.assert_close(weights(learn), mean_so_far(learn.keep.steps))
    first, *_, last = learn.keep.steps
    assert not first[:768].equal(last[:768])


def test_a_model_that_is_wrapped_for_the_fit():
    class Wrap(Callback):
        order = 11  # as fastai's ParallelTrainer
        def before_fit(self): self.learn.model = nn.DataParallel(self.learn.model)
        def after_fit(self): self.learn.model = self.learn.model.module
    learn = mk(cbs=[Wrap()])
    with learn.no_bar(): learn.fit(2)
    torch.testing.assert_close(weights(learn), mean_so_far(learn.keep.steps))


def test_a_layer_that_is_replaced_within_a_fit_is_named():
    class Replace(Callback):
        order = 15
        def before_fit(self): self.before = True
        def before_validate(self):
            if self.on: self.model[4] = nn.Linear(16, 10)
    learn = mk(cbs=[Replace()])
    learn.replace.on = True
    with learn.no_bar():
        with pytest.raises(ValueError, match='weight of Linear was in the model .* replace layers before the fit'): learn.fit(1)
        learn.replace.on = False  # the remedy: the layer is there before the fit
        learn.fit(1)
    torch.testing.assert_close(weights(learn), mean_so_far(learn.keep.steps))


class BreakOff(Callback):
    at = None
    def after_train(self):
        if self.epoch == self.at: raise ConnectionError('gone')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['recurrent', 'tied', 'weird', 'weight', 'bfloat16', 'norm'])
def test_a_checkpoint_keeps_it_to_the_bit(name, tmp_path, monkeypatch):
    def make(run): return special(name, [Checkpoint(tmp_path/run), BreakOff()])
    def state(learn): return learn.model.state_dict(), learn.ema.learning, learn.ema.n_averaged
    whole, broken = make('whole'), make('broken')
    with whole.no_bar(): whole.fit(3)
    monkeypatch.setattr(BreakOff, 'at', 1)  # an attribute of the callback itself would be kept
    with broken.no_bar(), pytest.raises(ConnectionError): broken.fit(3)
    monkeypatch.undo()
    again = make('broken')
    with again.no_bar(): again.fit(3)
    (a, b, n), (c, d, m) = state(whole), state(again)
    assert n == m == 12 and a.keys() == c.keys()
    assert all(torch.equal(a[k], c[k]) for k in a) and all(map(torch.equal, b, d)) and len(b) == len(d)


def test_averages_of_another_model_are_refused():
    cb = EMA()
    cb.learn, cb.avg = SimpleNamespace(model=nn.Linear(2, 2)), [torch.zeros(2, 2), torch.zeros(1)]
    with pytest.raises(ValueError, match='averages of another model'): cb.resumed()


def test_it_is_copied_and_exported_without_the_averages(tmp_path):
    learn = mk(path=tmp_path)
    with learn.no_bar(): learn.fit(1)
    learn.remove_cb(Keep)
    learn.export('model.pkl')
    with pytest.warns(UserWarning, match='pickle'): again = load_learner(tmp_path/'model.pkl')
    assert weights(again).equal(weights(learn)) and again.ema.avg == [] and not again.ema.is_out


def test_a_fit_that_is_broken_off_leaves_a_learner_that_fits():
    class Break(Callback):
        order, on = 30, True
        def before_validate(self):
            if self.on: raise SystemError('broken off')
    learn = mk(cbs=[Break()])
    try: learn.fit(1)
    except SystemError: pass
    learn.remove_cb(Break)
    learn.fit(1)
    torch.testing.assert_close(weights(learn), mean_so_far(learn.keep.steps))
