"The live curves of any Learner: what is drawn is what the Recorder has, they stand beside other callbacks, and they leave the training as it is"
import math

import numpy as np
import pytest
import torch
from fastai.callback.schedule import Learner  # noqa: F401, gives every Learner `lr_find`
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.metrics import accuracy

from s9_fastai.report.live import LiveCurves
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.test_utils import quiet, synth_learner
from s9_fastai.training.record import EpochRecorder


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


@pytest.mark.parametrize('kwargs', [{}, dict(steps=True), dict(grad_norm=True)])
def test_the_training_is_the_same_with_and_without(kwargs, tmp_path):
    alone, drawn = (quiet(synth_learner(metrics=accuracy, cbs=cbs)) for cbs in ([], [LiveCurves(tmp_path/'a.png', **kwargs)]))
    for learn in (alone, drawn): learn.fit(2)
    assert weights(alone).equal(weights(drawn)) and (tmp_path/'a.png').is_file()


def test_the_lines_are_the_values_of_the_recorder(tmp_path):
    from s9_fastai.report import live
    figs = []
    learn = quiet(synth_learner(metrics=accuracy, cbs=[EpochRecorder(), LiveCurves(tmp_path/'a.png', steps=True), SaveModelCallback(fname='best')], path=tmp_path))
    draw = live.plot_progress
    with pytest.MonkeyPatch.context() as m:
        m.setattr(live, 'plot_progress', lambda *a: figs.append(draw(*a)) or figs[-1])
        learn.fit(3)
    loss, acc, lr, step, *_ = figs[-1].axes
    values = np.array([list(v) for v in learn.recorder.values], float)
    names = list(learn.recorder.metric_names)[1:]
    assert list(loss.lines[1].get_ydata()) == list(values[:, names.index('valid_loss')]) and list(acc.lines[0].get_ydata()) == list(values[:, names.index('train_accuracy')])
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3] and len(step.lines[0].get_ydata()) == 12 and len(figs) == 3


def test_the_norm_is_that_of_the_clipped_gradient():
    learn = quiet(synth_learner(cbs=[LiveCurves(grad_norm=True), GradientClip(0.01)]))
    learn.fit(1)
    assert (learn.live_curves.steps.grad_norm <= 0.0101).all() and (learn.live_curves.steps.grad_norm > 0.005).all()


def test_validation_and_lr_find_draw_nothing(tmp_path):
    learn = quiet(synth_learner(metrics=accuracy, cbs=LiveCurves(tmp_path/'a.png', steps=True), path=tmp_path))
    learn.fit(1)
    (tmp_path/'a.png').unlink()
    learn.validate(), learn.get_preds(), learn.lr_find(num_it=5, show_plot=False)
    assert not (tmp_path/'a.png').exists()


def test_a_resumed_run_draws_its_first_epochs_too(tmp_path):
    def made(): return quiet(synth_learner(metrics=accuracy, cbs=[EpochRecorder(), Checkpoint(tmp_path/'run'), LiveCurves(tmp_path/'a.png')]))
    made().fit(2)
    again = made()
    again.fit(4)
    curves = again.live_curves.curves
    assert curves.epoch.tolist()[-1] == 4 and len(curves) == len(again.recorder.values) and not math.isnan(curves.valid_loss.iloc[-1])


def test_a_folder_that_is_not_there_is_made(tmp_path):
    learn = quiet(synth_learner(cbs=LiveCurves(tmp_path/'new'/'a.png')))
    learn.fit(1)
    assert (tmp_path/'new'/'a.png').is_file()
