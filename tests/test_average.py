"The moving average of the weights beside what else a Learner may be asked to do"
from types import SimpleNamespace

import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import set_seed
from fastcore.basics import noop
from torch.optim.swa_utils import AveragedModel

from s9_fastai.average import WeightAverage
from s9_fastai.learner import get_recipe, s9_learner
from s9_fastai.test_utils import synth_dls, synth_learner


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


def mk(age=0.5, cbs=(), **kwargs): return quiet(synth_learner(cbs=[WeightAverage(age), Keep(), *cbs], **kwargs))


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
    kept = torch.cat([p.flatten() for p in learn.weight_average.avg.parameters()])  # the weights that learnt
    assert weights(learn).equal(before) and kept.equal(last) and learn.weight_average.is_out


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
    recipe, cbs = get_recipe(n_channels=4, sched='none', compute='plain'), [WeightAverage(0.5), Statistics()]
    learn = quiet(s9_learner(synth_dls(64), recipe, cbs=cbs))
    learn.fit(2)
    assert len(cbs[1].seen) == learn.model.conv1.norm.num_batches_tracked == 8
    for found, seen in zip(learn.model.buffers(), zip(*cbs[1].seen), strict=True):
        torch.testing.assert_close(found, mean_so_far(seen) if found.is_floating_point() else seen[-1])


def test_tied_weights_are_averaged_once():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    cb = WeightAverage(0.5)
    cb.learn, cb.avg = SimpleNamespace(model=model), AveragedModel(model)
    with torch.no_grad(): cb.avg.module[0].weight.zero_()
    was = model[0].weight.clone()
    cb.swap()
    assert not model[0].weight.any() and (cb.avg.module[1].weight == was).all()


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
