"""The Learner of the experiment: what `fit` does and writes, and that all of fastai keeps working on it"""
import copy
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from functools import partial
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, IntToFloatTensor, ToTensor
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastai.metrics import accuracy, accuracy_multi, error_rate, rmse, top_k_accuracy
from fastai.optimizer import Adam, Lamb, OptimWrapper
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage, PILImageBW
from fastai.vision.data import ImageBlock, ImageDataLoaders
from fastcore.basics import noop
from PIL import Image
from processes import python
from torch import nn
from torch.nn import functional as F

import s9_fastai.app.recipe
from s9_fastai.core.checks import range_text
from s9_fastai.augment.policies import POLICIES, AUGMENTS
from s9_fastai.app.command import command_parser
from s9_fastai.augment.keyed import KeyedDL
from s9_fastai.nets.net import NORMS, Net
from s9_fastai.training.schedule import MODES, PlateauLR, TriangularLR, StepLR
import fastai.vision.learner  # how fastai lays out pictures; that the package needs no such import is a test of its own
from s9_fastai.cifar.facts import CLASSES, Cifar10, Split
from s9_fastai.cifar.loaders import cifar_block, cifar_dls
from s9_fastai.app.inputs import check_inputs, n_outputs
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import Recipe, get_recipe
from s9_fastai.training.record import EpochRecorder
from s9_fastai.app.checked import field_kind, field_range
from s9_fastai.app.run import option_values
from s9_fastai.app.export import main_export, s9_export
from s9_fastai.app.predict import main_predict, s9_predict
from s9_fastai.test_utils import synth_cifar, synth_images
from s9_fastai.app.train import main_summary, main_train, s9_summary, s9_train
import albumentations as A

names = ['epoch', 'train_loss', 'valid_loss', 'train_accuracy', 'valid_accuracy', 'lr', 'time']
num = r'\d+\.\d+(?:e-\d+)?'
epoch_re = re.compile(rf'EPOCH: (\d+)\nLoss=({num}) Batch_id=(\d+) Accuracy=(\d+\.\d\d)\n\n'
                      rf'Test set: Average loss: (\d+\.\d{{4}}), Accuracy: (\d+)/(\d+) \((\d+\.\d\d)%\)\n\nLearning rate: ({num})\n')


def tiny_dls(policy='reference', bs=20, seed=1, num_workers=0, **kwargs):
    "64 training and 40 test images; four training batches, the last one partial"
    data = synth_cifar(64, 40)
    return cifar_block(data, policy).dataloaders(
        range(104), bs=bs, seed=seed, num_workers=num_workers, device='cpu', drop_last=False, **kwargs)


@pytest.fixture
def mk(tmp_path):
    "Make a quiet tiny Learner"
    def _inner(recipe='stated', dls=None, seed=0, **kwargs):
        dls = dls or tiny_dls()
        set_seed(seed)
        learn = s9_learner(dls, recipe, **{'path': tmp_path, **kwargs})
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    yield _inner
    plt.close('all')


@pytest.fixture(scope='module')
def trained():
    "A Learner that has learned a little; for tests that do not train it further"
    set_seed(0)
    learn = s9_learner(tiny_dls())
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(4)
    return learn


def flat(learn): return torch.cat([o.detach().flatten().float() for o in learn.model.state_dict().values()])
def row(learn): return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
def log(d): return [m.groups() for m in epoch_re.finditer((Path(d)/'log.txt').read_text())]
def picture(): return Image.fromarray(synth_images(40, seed=1)[0][3])


class ByHand(Callback):
    "The plain reference of the table: size, loss and hits of every batch"
    order = 40
    def before_fit(self): self.rows = [] if not hasattr(self, 'rows') else self.rows
    def after_loss(self):
        hits = (self.pred.argmax(1) == self.y).sum().item()
        self.rows.append((self.epoch, self.training, len(self.y), self.loss.item(), hits))

    def mean(self, epoch, training):
        n, loss, hits = map(np.array, zip(*[r[2:] for r in self.rows if r[:2] == (epoch, training)]))
        return (n*loss).sum()/n.sum(), hits.sum()/n.sum()


# --- fit

def test_batches_of_the_sample():
    dls = cifar_dls('sample', seed=1, device='cpu')
    assert len(dls.train) == 16 and len(dls.train.get_idxs()) - 15*128 == 80 and not dls.train.drop_last


def test_the_table_equals_the_plain_reference(mk):
    learn = mk(cbs=ByHand())
    learn.fit(3)
    assert list(learn.recorder.metric_names) == names and len(learn.recorder.lrs) == 3*4
    assert [r[2] for r in learn.by_hand.rows if r[1]] == 3*[20, 20, 20, 4]
    for e, vals in enumerate(learn.recorder.values):
        (tl, ta), (vl, va) = learn.by_hand.mean(e, True), learn.by_hand.mean(e, False)
        np.testing.assert_allclose(vals, [tl, vl, ta, va, 0.05], rtol=1e-5)
    np.testing.assert_allclose(learn.validate(), [vl, va], rtol=1e-5)
    assert list(learn.recorder.metric_names) == names


def test_the_recipe_is_what_the_learner_does(mk):
    learn = mk(get_recipe(lr=0.02, mom=0.8, dropout=0.3, n_channels=8, norm='gn', step_size=1, gamma=0.1, wd=0.))
    learn.fit(2)
    assert isinstance(learn, Learner) and learn.model.fc.in_features == 8 and learn.model.conv5.drop.p == 0.3
    assert (learn.opt.hypers[0]['mom'], learn.opt.hypers[0]['wd']) == (0.8, 0)
    np.testing.assert_allclose(learn.recorder.lrs, [0.02]*4 + [0.002]*4)
    assert [type(cb) for cb in learn.cbs if isinstance(cb, ParamScheduler)] == [StepLR]


def test_log_and_history(mk, tmp_path):
    learn = mk(run_dir=tmp_path/'run', cbs=ByHand())
    learn.fit(2), learn.fit(1)
    text = (tmp_path/'run'/'log.txt').read_text()
    assert epoch_re.sub('', text) == ''  # nothing but epochs in the reference's format
    rows = log(tmp_path/'run')
    assert [int(r[0]) for r in rows] == [1, 2, 3] and {r[2] for r in rows} == {'3'} and {r[6] for r in rows} == {'40'}
    lasts = [r for r in learn.by_hand.rows if r[1]][3::4]  # the last batch of each epoch
    np.testing.assert_allclose([float(r[1]) for r in rows], [o[3] for o in lasts], rtol=1e-6)
    for r in rows: assert f'{100*int(r[5])/40:.2f}' == r[7]
    vals = dict(zip(names[1:], learn.recorder.values[-1]))
    assert rows[-1][3:6] == (f'{100*vals["train_accuracy"]:.2f}', f'{vals["valid_loss"]:.4f}', f'{40*vals["valid_accuracy"]:.0f}')
    hist = list(csv.DictReader(open(tmp_path/'run'/'history.csv')))
    assert list(hist[0]) == names and [h['epoch'] for h in hist] == ['1', '2', '3']
    assert [float(hist[-1][n]) for n in names[1:-1]] == list(learn.recorder.values[-1])


def test_the_references_last_lines_match_the_format():
    "From the experiment's log, without tqdm's bar"
    assert epoch_re.fullmatch('EPOCH: 100\nLoss=0.46943503618240356 Batch_id=390 Accuracy=82.27\n\n'
                              'Test set: Average loss: 0.4303, Accuracy: 8543/10000 (85.43%)\n\nLearning rate: 0.0015625\n')


@pytest.mark.parametrize('name', ['stated', 'logged'])
def test_the_two_recipes_rates_in_the_log(mk, tmp_path, name):
    "The reference prints the rate after its scheduler's step: that of the coming epoch; shown with steps 25 or 20 times shorter"
    step = {'stated': 25, 'logged': 20}[name]
    assert get_recipe(name).step_size == step and get_recipe(name).dropout == {'stated': 0.1, 'logged': 0.05}[name]
    short = {25: 2, 20: 1}[step]
    mk(get_recipe(name, step_size=short, n_channels=2), run_dir=tmp_path/'run').fit(5)
    rates = [float(r[8]) for r in log(tmp_path/'run')]
    assert rates == [0.05*0.5**(e//short) for e in range(1, 6)]
    if name == 'logged': assert rates[3:] == [0.003125, 0.0015625]  # as after epochs 80 and 100


def test_text_of_small_and_odd_rates(mk, tmp_path):
    learn = mk(get_recipe(n_channels=2), run_dir=tmp_path/'run')
    learn.fit_one_cycle(1, 0.001)
    assert epoch_re.sub('', (tmp_path/'run'/'log.txt').read_text()) == ''


def fit_digest(seed, num_workers=0, n=2):
    dls = tiny_dls(seed=seed, num_workers=num_workers)
    set_seed(seed)
    learn = s9_learner(dls, get_recipe(n_channels=8))
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(n)
    return hashlib.sha256(flat(learn).numpy().tobytes()).hexdigest()


def test_a_seed_is_a_run_bit_for_bit():
    ref = fit_digest(3)
    assert [fit_digest(3, w) for w in (1, 2)] == [ref, ref] and fit_digest(4, n=1) != fit_digest(3, n=1)
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_learner\nprint(test_learner.fit_digest(3, 1))'
    if torch.get_num_threads() == 1:  # the order of a sum is that of the threads
        assert new_python(code, OMP_NUM_THREADS='1', PYTHONHASHSEED='7') == ref


def new_python(code, **env):
    "What a new Python prints"
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env={**os.environ, **env}, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    return res.stdout.strip()


# --- other ways to train

def test_lr_find_leaves_no_trace(mk, tmp_path):
    learn = mk(get_recipe(step_size=1), run_dir=tmp_path/'run')
    learn.fit(2)
    before, state, text = flat(learn), copy.deepcopy(learn.opt.state_dict()), (tmp_path/'run'/'log.txt').read_text()
    res = learn.lr_find(num_it=30, start_lr=1e-5, end_lr=1)
    assert 1e-5 < res.valley < 1
    lrs = np.array(learn.recorder.lrs)
    np.testing.assert_allclose(lrs, 1e-5*1e5**(np.arange(30)/30), rtol=1e-5)  # no step of StepLR in between
    assert torch.equal(flat(learn), before)
    for a, b in zip(learn.opt.state_dict()['state'], state['state']): assert torch.equal(a['grad_avg'], b['grad_avg'])
    assert sorted(os.listdir(tmp_path/'run')) == ['checkpoints', 'history.csv', 'log.txt'] and (tmp_path/'run'/'log.txt').read_text() == text
    learn.fit(2)
    assert [float(r[8]) for r in log(tmp_path/'run')] == [0.025, 0.0125]*2 and learn.recorder.lrs[0] == 0.05


def test_lr_find_first_does_not_change_what_fit_starts_from(mk):
    a, b = mk(), mk()
    a.lr_find(num_it=5, show_plot=False)
    assert torch.equal(flat(a), flat(b))
    assert a.opt.hypers[0]['mom'] == 0.9


def test_fit_one_cycle(mk, tmp_path):
    learn = mk(get_recipe(step_size=1), run_dir=tmp_path/'run')
    learn.fit_one_cycle(2, 0.1)
    lrs = learn.recorder.lrs
    assert len(lrs) == 8 and max(lrs) > 0.09 and lrs[0] < 0.01 and lrs[-1] < 0.01 and len(log(tmp_path/'run')) == 2
    learn.fit(1)
    assert learn.recorder.lrs == [0.05]*4


def test_fit_step(mk, tmp_path):
    learn = mk(run_dir=tmp_path/'run')
    learn.fit_step(3, lr=0.1, step_size=1, gamma=0.1)
    np.testing.assert_allclose(learn.recorder.lrs[::4], [0.1, 0.01, 0.001])
    np.testing.assert_allclose([float(r[8]) for r in log(tmp_path/'run')], [0.01, 0.001, 0.0001])
    learn.fit(1)
    assert learn.recorder.lrs == [0.05]*4


def test_start_epoch(mk, tmp_path):
    learn = mk(get_recipe(step_size=1), run_dir=tmp_path/'run')
    learn.fit(3, start_epoch=1)
    assert learn.recorder.lrs[::4] == [0.025, 0.0125]
    assert [int(r[0]) for r in log(tmp_path/'run')] == [2, 3]  # the epoch that the log names is the one that ran


def test_freeze_and_unfreeze(mk):
    def halves(m): return [[p for n, p in m.named_parameters() if n.startswith('fc') == fc] for fc in (False, True)]
    learn = mk(splitter=halves)
    def move():
        before = copy.deepcopy(halves(learn.model))
        learn.fit(1)
        conv, fc = [any(not torch.equal(a, b) for a, b in zip(x, y) if a.ndim > 1) for x, y in zip(before, halves(learn.model))]
        return conv, fc
    learn.freeze()
    assert move() == (False, True)
    learn.unfreeze()
    assert move() == (True, True)
    learn.fit(1, lr=slice(0.001, 0.1))
    assert [h['lr'] for h in learn.opt.hypers] == [0.001, 0.1] and row(learn)['lr'] == 0.1


def test_mixed_precision(mk):
    learn = mk().to_plain().to_fp16()
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all() and list(learn.recorder.metric_names) == names
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())
    learn.to_fp32()
    assert not learn._grab_cbs(MixedPrecision)
    learn.fit(1)


def test_gradient_accumulation_and_mixup(mk):
    learn, plain = mk(), mk()
    learn.fit(1, cbs=GradientAccumulation(64)), plain.fit(1)
    assert not torch.equal(flat(learn), flat(plain))
    learn.fit(1, cbs=[MixUp(0.4), ByHand()])
    vals = row(learn)
    assert np.isfinite(list(vals.values())[:-1]).all()
    np.testing.assert_allclose(learn.validate(), [vals['valid_loss'], vals['valid_accuracy']], rtol=1e-5)


def test_other_metrics(mk, tmp_path):
    learn = mk(metrics=[accuracy, top_k_accuracy], run_dir=tmp_path/'run')
    learn.fit(1)
    assert learn.recorder.metric_names[-4:-2] == ['train_top_k_accuracy', 'valid_top_k_accuracy']
    assert len(log(tmp_path/'run')) == 1 and row(learn)['valid_top_k_accuracy'] >= row(learn)['valid_accuracy']


def test_a_run_log_without_accuracy_writes_the_history_alone(mk, tmp_path):
    learn = mk(metrics=[top_k_accuracy], run_dir=tmp_path/'run')
    learn.fit(1)
    assert (tmp_path/'run'/'history.csv').exists() and not (tmp_path/'run'/'log.txt').exists()


# --- callbacks

def test_csv_logger(mk, tmp_path):
    learn = mk(cbs=CSVLogger('mine.csv'))
    learn.fit(2)
    rows = list(csv.DictReader(open(tmp_path/'mine.csv')))
    assert list(rows[0]) == names and [float(rows[1][n]) for n in names[1:-1]] == list(learn.recorder.values[1])
    learn.predict(picture())
    assert len(open(tmp_path/'mine.csv').readlines()) == 3


@pytest.mark.parametrize('monitor, col, best', [('valid_accuracy', 3, max), ('valid_loss', 1, min), ('train_loss', 0, min)])
def test_save_model(mk, monitor, col, best):
    class Keep(Callback):
        "The weights after each epoch"
        order = 99
        def before_fit(self): self.kept = []
        def after_epoch(self): self.kept.append(flat(self.learn))
    learn = mk(cbs=Keep())
    learn.fit(4, cbs=SaveModelCallback(monitor=monitor, with_opt=True))  # loads the best at the end
    vals = [v[col] for v in learn.recorder.values]
    assert torch.equal(flat(learn), learn.keep.kept[vals.index(best(vals))])


def test_early_stopping(mk):
    learn = mk()
    learn.fit(9, lr=0., cbs=EarlyStoppingCallback(monitor='train_loss', min_delta=9., patience=2))
    assert len(learn.recorder.values) == 3


def test_show_graph_gets_the_validation_losses(mk):
    class Bar:
        def update_graph(self, graphs, *bounds): self.graphs = graphs
    learn = mk()
    learn.progress = type('Progress', (), {'mbar': Bar()})()
    learn.fit(3, cbs=ShowGraphCallback())
    (_, trn), (iters, val) = learn.progress.mbar.graphs
    assert len(trn) == 12 and iters == [4, 8, 12] and val == [v[1] for v in learn.recorder.values]
    np.testing.assert_allclose(val[-1], learn.validate()[0], rtol=1e-5)


def test_the_bars_of_fastprogress(tmp_path, capsys):
    learn = s9_learner(tiny_dls(), path=tmp_path)
    assert learn._grab_cbs(ProgressCallback)
    learn.fit(1)
    out = capsys.readouterr().out
    assert all(n in out for n in names)


# --- the recorder

def test_recorder_plots(mk):
    learn = mk(get_recipe(step_size=1))
    learn.fit(3)
    ax = learn.recorder.plot_loss(skip_start=0, show_epochs=True)
    lines = {o.get_label(): o.get_ydata() for o in ax.get_lines()}
    assert len(lines['train']) == 12 and list(lines['valid']) == [v[1] for v in learn.recorder.values]
    plt.figure()
    learn.recorder.plot_sched()
    assert any(list(o.get_ydata()) == [0.05]*4 + [0.025]*4 + [0.0125]*4 for a in plt.gcf().axes for o in a.get_lines())


def test_validate_on_any_loader(trained):
    n = len(trained.recorder.metric_names)
    assert len(trained.validate()) == 2 and len(trained.validate(0)) == 2
    loss, acc = trained.validate(dl=trained.dls.test_dl(range(64, 74), with_labels=True))
    preds, targs = trained.get_preds(dl=trained.dls.test_dl(range(64, 74), with_labels=True))
    ref = F.nll_loss(preds.log(), targs).item(), (preds.argmax(1) == targs).float().mean().item()
    np.testing.assert_allclose([loss, acc], ref, rtol=1e-4)
    assert len(trained.recorder.metric_names) == n


def test_it_is_one_recorder(mk):
    learn = mk()
    assert [type(cb) for cb in learn.cbs if cb.name == 'recorder'] == [EpochRecorder] and learn.recorder in learn.cbs


# --- looking

def test_pictures_need_no_other_import():
    "fastai lays out pictures in rows and columns only once its vision modules are there"
    code = '''import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.app.learner import s9_learner
from fastai.interpret import ClassificationInterpretation
learn = s9_learner(cifar_dls('sample', bs=10, device='cpu'))
def n_axes(f):
    f()
    return sum(bool(a.get_title()) for a in plt.gcf().axes)
with learn.no_bar():
    print(n_axes(lambda: learn.dls.show_batch(max_n=4)), n_axes(lambda: learn.show_results(max_n=4)))
    interp = ClassificationInterpretation.from_learner(learn, dl=learn.dls.test_dl(range(20), with_labels=True))
    print(n_axes(lambda: interp.plot_top_losses(4)))'''
    assert new_python(code).split() == ['4', '4', '4']


def texts(): return [a.get_title() for a in plt.gcf().axes if a.get_title()]

def test_show_batch_and_show_results(mk):
    learn = mk()
    learn.dls.show_batch(max_n=4)
    assert len(texts()) == 4 and set(texts()) <= set(CLASSES)
    learn.dls.show_batch(max_n=4, unique=True)
    assert len(set(texts())) == 1
    learn.dls.show_batch(max_n=4)
    assert len(learn.dls.train.get_idxs()) == 64  # unique=True is over
    learn.show_results(max_n=4)
    assert len(texts()) == 4 and all(set(t.split('\n')) <= set(CLASSES) for t in texts())
    learn.show_results(ds_idx=0, max_n=2, shuffle=False)


def test_interpretation(trained):
    interp = ClassificationInterpretation.from_learner(trained)
    preds, targs = trained.get_preds()
    cm = interp.confusion_matrix()
    ref = np.zeros((10, 10), int)
    for t, p in zip(targs, preds.argmax(1)): ref[t, p] += 1
    np.testing.assert_array_equal(cm, ref)
    losses, idxs = interp.top_losses(5)
    each = F.cross_entropy(trained.get_preds(act=noop)[0], targs, reduction='none')
    np.testing.assert_allclose(losses, np.sort(each)[::-1][:5], rtol=1e-4)
    np.testing.assert_allclose(each[idxs], losses, rtol=1e-4)
    interp.plot_confusion_matrix(), interp.plot_top_losses(4), interp.most_confused()
    assert interp.vocab == list(CLASSES)


def test_summary(trained):
    text = str(trained.summary())
    assert '99,912' in text and 'CrossEntropyLoss' in text and 'StepLR' in text


# --- predicting

@pytest.fixture(scope='module')
def known(trained): return trained.get_preds()[0][3]  # of `picture`


def as_path(im, d):
    im.save(d/'im.png')
    return d/'im.png'

@pytest.mark.parametrize('what', [
    lambda im, d: im, lambda im, d: PILImage(im), lambda im, d: np.array(im), as_path, lambda im, d: str(as_path(im, d)),
                                  lambda im, d: im.convert('RGBA'), lambda im, d: 67, lambda im, d: np.int64(67)],
                         ids=['pil', 'PILImage', 'array', 'Path', 'str', 'RGBA', 'index', 'numpy index'])
def test_predict_the_same_image(trained, known, tmp_path, what):
    cls, i, probs = trained.predict(what(picture(), tmp_path))
    torch.testing.assert_close(probs, known, rtol=1e-4, atol=1e-6)
    assert cls == CLASSES[int(i)] and int(i) == int(probs.argmax()) and abs(probs.sum() - 1) < 1e-5


@pytest.mark.parametrize('im', [
    picture().convert('L'), PILImageBW(picture().convert('L')), picture().convert('P'), picture().resize((90, 50)),
    picture().resize((5, 300)), np.array(picture())[..., 0]], ids=['L', 'BW', 'P', 'wide', 'tall', 'grey array'])
def test_predict_other_images(trained, im):
    a, b = trained.predict(im), trained.predict(im)
    assert a[0] in CLASSES and torch.equal(a[2], b[2]) and abs(a[2].sum() - 1) < 1e-5


def test_predict_with_input(trained):
    inp, *_ = trained.predict(picture(), with_input=True)
    x = inp.permute(1, 2, 0).numpy()
    if inp.is_floating_point(): x = 255*x
    assert abs(x - np.array(picture()).astype(float)).max() <= 1  # true colours


def test_predict_a_file_that_is_not_there(trained):
    with pytest.raises(FileNotFoundError, match='nowhere.png'): trained.predict('nowhere.png')


def test_test_dl(trained):
    ref, targs = trained.get_preds()
    dl = trained.dls.test_dl([Image.fromarray(o) for o in synth_images(40, seed=1)[0]])
    preds, none = trained.get_preds(dl=dl)
    torch.testing.assert_close(preds, ref, rtol=1e-4, atol=1e-6)
    assert none is None
    _, again = trained.get_preds(dl=trained.dls.test_dl(range(64, 104), with_labels=True))
    assert torch.equal(again, targs)


def test_predictions_of_the_training_set_come_in_its_order(trained):
    _, targs = trained.get_preds(ds_idx=0)
    np.testing.assert_array_equal(targs, synth_images(64)[1])


# --- tta

def test_tta(mk):
    policy = A.Compose([A.PixelDropout(dropout_prob=0.3, p=1)])
    class Seen(Callback):
        "What the network sees in each pass"
        def before_fit(self): self.passes = []
        def before_validate(self): self.passes.append([])
        def before_batch(self): self.passes[-1].append(self.x.clone())

    def tta(seed):
        learn = mk(dls=tiny_dls(policy, seed=seed), cbs=Seen())
        preds, targs = learn.tta(n=3)
        np.testing.assert_array_equal(targs, synth_images(40, seed=1)[1])
        return preds, [torch.cat(p) for p in learn.seen.passes]

    preds, passes = tta(1)
    assert len(passes) == 4
    draws = [x.numpy().tobytes() for p in passes[:3] for x in p]
    assert len(set(draws)) == 3*40  # no two passes, and no two images, have a draw in common
    assert torch.equal(passes[3], torch.cat([b[0] for b in tiny_dls().valid]))  # the last pass is not augmented
    torch.testing.assert_close(preds.sum(1), torch.ones(40))
    again, same = tta(1)
    assert torch.equal(again, preds) and all(map(torch.equal, same, passes))
    assert not torch.equal(tta(2)[1][0], passes[0])


# --- files

def test_save_and_load(mk):
    learn, other = mk(), mk(seed=5)
    learn.fit(1)
    learn.save('mine')
    other.load('mine')
    assert torch.equal(flat(learn), flat(other))
    for a, b in zip(learn.opt.state_dict()['state'], other.opt.state_dict()['state']): assert torch.equal(a['grad_avg'], b['grad_avg'])
    assert learn.validate() == other.validate()


def test_export_and_load_in_a_fresh_process(mk, tmp_path):
    "There, no data set can be found and nothing may be written"
    learn = mk(run_dir=tmp_path/'run')
    learn.fit(1)
    learn.dls.train.dataset[0]
    learn.export('net.pkl')
    picture().save(tmp_path/'im.png')
    code = f'''import json
from fastai.learner import load_learner
learn = load_learner({str(tmp_path/'net.pkl')!r})
assert learn.dls.train.after_item[0].train is not None and len(learn.dls.train_ds) == 0
with learn.no_bar(): res = learn.predict({str(tmp_path/'im.png')!r})
print(json.dumps([res[0], int(res[1]), res[2].tolist()]))'''
    text = (tmp_path/'run'/'log.txt').read_text()
    (tmp_path/'home').mkdir()
    home = str(tmp_path/'home')
    name, i, probs = json.loads(python(code, HOME=home, FASTAI_HOME=home, S9_CIFAR10=str(tmp_path/'gone')))
    ref = learn.predict(tmp_path/'im.png')
    assert (name, i) == (ref[0], int(ref[1]))
    torch.testing.assert_close(torch.tensor(probs), ref[2], rtol=1e-5, atol=1e-7)
    assert (tmp_path/'run'/'log.txt').read_text() == text
    learn.fit(1)  # the Learner that was exported goes on


def test_the_exported_file_holds_no_images(mk, tmp_path):
    learn = mk()
    learn.fit(1), learn.dls.one_batch(), learn.show_results(max_n=1), learn.tta(n=1)
    learn.export('net.pkl')
    content = (tmp_path/'net.pkl').read_bytes()
    assert len(content) < 600_000  # 99,912 weights of 4 bytes, and little else
    assert not any(im[5].tobytes() in content for im in np.concatenate([synth_images(64)[0], synth_images(40, seed=1)[0]]))
    big = Cifar10(Split(np.broadcast_to(np.uint8(0), (50000, 32, 32, 3)), np.zeros(50000, int)),
                  Split(np.broadcast_to(np.uint8(0), (10000, 32, 32, 3)), np.zeros(10000, int)), 'sample', 'blank')
    learn = mk(dls=cifar_block(big).dataloaders(range(60000), bs=128, seed=1, num_workers=0, device='cpu', drop_last=False))
    learn.export('big.pkl')
    assert (tmp_path/'big.pkl').stat().st_size < 1_500_000  # fastai keeps which of the 60,000 items were in which set


def test_a_loaded_learner_validates_and_can_be_trained_on_other_data(mk, tmp_path):
    learn = mk(get_recipe(step_size=1))
    learn.fit(1)
    learn.export('net.pkl')
    loaded = load_learner(tmp_path/'net.pkl')
    loaded.remove_cb(ProgressCallback)
    loaded.dls = tiny_dls()
    np.testing.assert_allclose(loaded.validate(), learn.validate(), rtol=1e-5)
    loaded.fit(2)
    assert loaded.recorder.lrs[::4] == [0.05, 0.025] and loaded.recipe == learn.recipe


# --- other data

def folder_of(path, n_classes, size=32, mode='RGB', per_class=6):
    "PNG files in a folder for each class"
    for i in range(n_classes*per_class):
        im = Image.fromarray(synth_images(n_classes*per_class, seed=2)[0][i]).resize((size, size)).convert(mode)
        (d := path/f'class{i%n_classes:02}').mkdir(parents=True, exist_ok=True)
        im.save(d/f'{i}.png')
    return path


def block_dls(path, x=ImageBlock, y=CategoryBlock, get_y=lambda p: p.parent.name, bs=8, **kwargs):
    "Plain loaders of a `DataBlock`, nothing of this package in them"
    block = DataBlock((x, y), get_items=lambda p: sorted(p.rglob('*.png')), get_y=get_y, **kwargs)
    return block.dataloaders(path, bs=bs, device='cpu', num_workers=0)


@pytest.mark.parametrize('n, size', [(3, 32), (14, 32), (3, 64)])
def test_outputs_are_the_classes_of_the_loaders(mk, tmp_path, n, size):
    "More than ten, fewer than ten, larger images; the run goes on, and its recipe is the one that was given"
    dls = ImageDataLoaders.from_folder(folder_of(tmp_path/'data', n, size), valid_pct=0.25, seed=1, bs=8, device='cpu', num_workers=0)
    recipe = get_recipe('fast', n_channels=4, epochs=2)
    learn = mk(recipe, dls, run_dir=tmp_path/'run')
    assert learn.model.fc.out_features == n == dls.c
    learn.fit(1)
    again = mk(recipe, dls, run_dir=tmp_path/'run', force=True)  # a triangle of two epochs is another one
    with pytest.warns(UserWarning, match='n_epoch was 1, is 2'): again.fit(2)
    assert np.isfinite(row(again)['valid_loss']) and again.recipe == recipe
    assert again.get_preds()[0].shape[1] == n and again.predict(dls.train_ds.items[0])[0] in dls.vocab


def test_pretrained_weights_are_of_cifars_classes(tmp_path, fault):
    folder_of(tmp_path, 3)
    with pytest.raises(ValueError, match='pretrained weights are of the 10 classes of CIFAR-10, but these loaders have 3 others: leave pretrained out') as e:
        s9_learner(block_dls(tmp_path), pretrained=True)
    fault('training', 'pretrained weights for other classes', e.value)
    folder_of(tmp_path/'ten', 10, per_class=2)
    with pytest.raises(ValueError, match='these loaders have 10 others'): s9_learner(block_dls(tmp_path/'ten', splitter=IndexSplitter([0, 2])), pretrained=True)
    for i, c in enumerate(CLASSES): (tmp_path/'ten'/f'class{i:02}').rename(tmp_path/'ten'/c)
    same = s9_learner(block_dls(tmp_path/'ten', splitter=IndexSplitter([0, 2])), pretrained=True).model
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), Net.pretrained().parameters()))


def test_loaders_without_classes_are_refused():
    dls = DataLoaders(tiny_dls().train, tiny_dls().valid)
    with pytest.raises(ValueError, match='neither c nor vocab, so the number of classes is not known: set it, such as dls.c = 10'):
        n_outputs(DataLoaders([], []))
    assert n_outputs(dls) == 10


noise = [  # what is wrong, the loaders, the message, and the loaders or arguments that the message advises
    ('small images', {}, r'shape \[8, 3, 16, 16\], but net takes one batch of images \(B, C, H, W\) with H and W at least 24: make them larger, with size=32 or item_tfms=Resize\(32\)', dict(item_tfms=Resize(32)), {}),
    ('images of whole numbers', dict(x=TransformBlock(type_tfms=PILImage.create, item_tfms=ToTensor)), r'the images are uint8, but net takes float32: add IntToFloatTensor\(\)',
     dict(x=TransformBlock(type_tfms=PILImage.create, item_tfms=ToTensor), batch_tfms=IntToFloatTensor()), {}),
    ('numbers as labels', dict(y=RegressionBlock, get_y=lambda p: float(p.parent.name[-1])), r"labels are float32 of shape \[8\].*give another loss_func",
     dict(y=RegressionBlock, get_y=lambda p: float(p.parent.name[-1])), dict(loss_func=MSELossFlat(), metrics=rmse))]


@pytest.mark.parametrize('what, bad, msg, advised, kwargs', noise, ids=[o[0] for o in noise])
def test_what_net_cannot_take_is_refused_before_the_training(mk, tmp_path, fault, what, bad, msg, advised, kwargs):
    "And what the message advises trains"
    folder_of(tmp_path, 3, 16 if what == 'small images' else 32)
    with pytest.raises(ValueError, match=msg) as e: mk(dls=block_dls(tmp_path, **bad))
    fault('training', f's9_learner with {what}', e.value)
    learn = mk(get_recipe(n_channels=4), block_dls(tmp_path, **advised), **kwargs)
    learn.fit(1)
    assert np.isfinite(row(learn)['valid_loss'])


@pytest.mark.parametrize('size', [24, 28, 32])
def test_grey_images_get_a_net_of_one_channel(mk, tmp_path, size):
    dls = block_dls(folder_of(tmp_path/'data', 3, size, 'L'), x=ImageBlock(PILImageBW))
    learn = mk(get_recipe(n_channels=4), dls)
    learn.fit(1)
    assert learn.model.conv1.conv.in_channels == 1 and np.isfinite(row(learn)['valid_loss'])


def test_several_inputs_are_refused(tmp_path):
    block = DataBlock((ImageBlock, ImageBlock, CategoryBlock), n_inp=2, get_items=lambda p: sorted(p.rglob('*.png')), getters=[None, None, lambda p: p.parent.name])
    dls = block.dataloaders(folder_of(tmp_path, 3), bs=8, device='cpu', num_workers=0)
    with pytest.raises(ValueError, match='a batch begins with 2 inputs, .*give s9_learner a model of your own'): s9_learner(dls)
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(2*3*32*32, 3))
        def forward(self, a, b): return self.net(torch.cat([a, b], 1))
    learn = s9_learner(dls, model=Two())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert np.isfinite(row(learn)['valid_loss'])


@pytest.mark.parametrize('kwargs', [{}, dict(dl_type=KeyedDL)], ids=['TfmdDL', 'KeyedDL'])
def test_the_look_at_a_batch_leaves_no_trace(tmp_path, kwargs):
    folder_of(tmp_path, 3)
    seen = []
    for look in (False, True):
        set_seed(3)
        dls = block_dls(tmp_path, **kwargs)
        if look: check_inputs(dls, 3)
        seen.append([torch.rand(1), *(x for _ in '12' for x, _ in dls.train), torch.rand(1), *(dls.one_batch()[0],)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


# --- other parts

optimizers = [Adam, partial(Lamb, mom=0.8), partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)]


@pytest.mark.parametrize('opt_func', optimizers, ids=['Adam', 'Lamb', 'AdamW', "torch's SGD"])
def test_other_optimizers_and_metrics(mk, opt_func):
    learn = mk(get_recipe('fast', n_channels=4), opt_func=opt_func, metrics=[error_rate, accuracy], lr=1e-3)
    before = flat(learn)
    learn.fit(2)
    assert not torch.equal(flat(learn), before) and row(learn)['valid_error_rate'] + row(learn)['valid_accuracy'] == pytest.approx(1)
    assert max(learn.recorder.lrs) <= 1e-3


@pytest.mark.parametrize('cb', [StepLR(3), TriangularLR(), PlateauLR(), ReduceLROnPlateau(), ParamScheduler({'lr': lambda pct: 0.1})], ids=lambda cb: type(cb).__name__)
def test_a_schedule_beside_the_recipes_is_refused(mk, fault, cb):
    msg = f"{type(cb).__name__} in cbs sets the learning rate, and so does sched 'step' of the recipe: give get_recipe\\(\"stated\", sched=\"none\"\\) as the recipe"
    for cbs in (cb, [cb]):
        with pytest.raises(ValueError, match=msg) as e: mk(cbs=cbs)
    if type(cb) is TriangularLR: fault('training', 'a schedule beside that of the recipe', e.value)
    learn = mk(get_recipe('stated', sched='none', n_channels=4), cbs=cb)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1)


def test_the_schedule_of_a_fit_needs_no_warning(mk):
    learn = mk(get_recipe(n_channels=4))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit_one_cycle(1), learn.fit_step(1, warmup=1), learn.fit(1, cbs=TriangularLR())


# --- the help

mains = {'s9_train': main_train, 's9_summary': main_summary, 's9_predict': main_predict, 's9_export': main_export}


@pytest.fixture
def typed(monkeypatch, capsys):
    "What a command prints when it ends at once, and what it complains of"
    def _inner(command, *args, width='80'):
        monkeypatch.setenv('COLUMNS', width)
        monkeypatch.setattr(sys, 'argv', [command, *args])
        with pytest.raises(SystemExit): mains[command]()
        return capsys.readouterr()
    return _inner


def help_text():
    "The help of s9_train as tools/options.py would write it down; another test asks whether what is written down is fresh"
    return command_parser(s9_train, values=option_values()).format_help()


own = s9_fastai.app.recipe
new = [('norm', NORMS, 'rms', ('root mean square', None)), ('policy', POLICIES, 'mine', None), ('augment', AUGMENTS, 'twice', ('two times', None)),
       ('sched', MODES, 'cosine', 'half a wave'), ('opt', own.CHOICES['opt'], 'adam', 'the usual'), ('compute', own.CHOICES['compute'], 'half', 'in float16')]


@pytest.mark.parametrize('field, where, name, what', new, ids=[o[0] for o in new])
def test_a_new_choice_is_in_the_help(monkeypatch, field, where, name, what):
    def of_field(text): return ' '.join(text.split()).split(f'--{field} (str) ')[1].split(' --')[0]
    before = of_field(help_text())
    assert all(repr(k) in before for k in where) and repr(name) not in before
    monkeypatch.setitem(where, name, what)
    about = what[0] if isinstance(what, tuple) else what
    assert (f'{name!r} ({about})' if about else repr(name)) in of_field(help_text())


@pytest.mark.parametrize('f', [f for f in fields(Recipe) if field_range(f)], ids=lambda f: f.name)
def test_the_range_of_a_field_is_checked_and_in_the_help(f):
    r, kind = field_range(f), field_kind(f)
    text = range_text(r)
    assert f': {text} [{f.default}]' in ' '.join(help_text().split())
    low = r.gt if r.ge is None else r.ge - (1 if kind is int else 1e-9)
    high = r.lt if r.le is None else r.le + (1 if kind is int else 1e-9)
    bad = (low, high) if kind is int else (low, high, float('inf'), float('nan'))
    for v in bad:
        with pytest.raises(ValueError, match=re.escape(f'{f.name} is {v}, but must be {text}')): Recipe(**{f.name: v})


def test_every_field_says_what_it_takes():
    assert {*own.field_values()} == {f.name for f in fields(Recipe)} == {'arch', 'pretrained', *own.CHOICES, *(f.name for f in fields(Recipe) if field_range(f))}


@pytest.mark.parametrize('command', mains)
def test_the_help_fits_80_columns(typed, command):
    text = typed(command, '--help').out
    assert max(map(len, text.splitlines())) <= 80 and text.startswith(f'usage: {command} [options]') and '--version' in text


flags = [(c, flag) for c, f in (('s9_train', s9_train), ('s9_summary', s9_summary), ('s9_predict', s9_predict), ('s9_export', s9_export))
         for flag in command_parser(f, () if c in ('s9_predict', 's9_export') else None)._option_string_actions if flag.startswith('--') and flag not in ('--pdb', '--xtra')]


@pytest.mark.parametrize('command', mains)
def test_options_are_written_in_full(typed, command):
    for flag in [flag for c, flag in flags if c == command]:
        out, err = typed(command, flag[:-1], '3')
        assert out == '' and f'unrecognized arguments: {flag[:-1]}' in err and err.count('\n') == 1


def test_the_option_that_was_meant_is_named(typed):
    for wrong, meant in (('--epoch', '--epochs'), ('--epoch=3', '--epochs'), ('--batch', None), ('--labelsmoothing', '--label-smoothing'), ('--held_out', '--held-out')):
        err = typed('s9_train', '--data', 'sample', wrong).err
        assert f'unrecognized arguments: {wrong}' in err and (f'; did you mean {meant}? (see' in err if meant else 'mean' not in err)


def test_no_script_takes_abbreviations():
    root = Path(__file__).resolve().parent.parent
    made = {p.relative_to(root).as_posix(): p.read_text(encoding='utf-8') for d in ('benchmarks', 'tools') for p in (root/d).rglob('*.py')}
    parsers = [(name, line) for name, text in made.items() for line in text.splitlines() if 'ArgumentParser(' in line]
    assert {name for name, _ in parsers} == {'benchmarks/common.py', 'tools/make_sample.py'}, 'the benchmarks have one parser, that of common.options'
    assert [line for _, line in parsers if 'allow_abbrev=False' not in line] == []
