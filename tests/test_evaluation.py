"""Numbers and pictures of a classifier's mistakes, each against another computation; what is drawn is read back from the axes"""
import random

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.calibration
import sklearn.metrics as skm
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.losses import BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.data import ImageBlock, MaskBlock
from torch import nn

from s9_fastai.report.calibration import brier, calibration, ece, fit_temperature, nll, plot_calibration, with_temperature
from s9_fastai.report.confusion import confusion, most_confused, plot_confusion
from s9_fastai.report.coverage import coverage, plot_coverage
from s9_fastai.report.intervals import deviations, wilson
from s9_fastai.report.labels import label, percent
from s9_fastai.report.losses import plot_highest_losses, top_losses
from s9_fastai.report.outputs import Outputs, outputs_of
from s9_fastai.report.paired import mcnemar
from s9_fastai.report.scores import accuracy_of, class_scores, plot_class_scores
from s9_fastai.report.several import best_thresholds, plot_thresholds, set_scores, threshold_scores
from s9_fastai.test_utils import quiet, synth_images, synth_learner

hostile = ['$a', 'b_c', '"d"', "'e'", '$\\frac{1$', 'g\x00\n\t', '\u202edcba', 'i\\', 'j^{k', '%s {0}', 'W'*100, '']


def outputs(n=300, c=5, seed=0, names=None, signal=2.5):
    "Random outputs; the true class is given more"
    rng = np.random.default_rng(seed)
    y = rng.integers(0, c, n)
    z = rng.normal(0, 1.5, (n, c))
    z[np.arange(n), y] += signal
    return Outputs(z, y, names)


def set_outputs(n=200, c=4, seed=0, names=None):
    "Random outputs where an item can have several classes"
    rng = np.random.default_rng(seed)
    y = rng.random((n, c)) < np.linspace(.6, .1, c)
    return Outputs(rng.normal(0, 1.5, (n, c)) + 2*y - 1, y, names)


sizes = pytest.mark.parametrize('n,c', [(1, 2), (50, 2), (300, 10), (500, 40), (1000, 100)])


# outputs

@pytest.mark.parametrize('kind', [np.asarray, torch.tensor, lambda x: torch.tensor(x).bfloat16(), lambda x: torch.tensor(x, requires_grad=True), lambda x: x.astype(np.float16)])
def test_outputs_of_arrays_of_any_kind(kind):
    z, y = outputs().logits.round(1), outputs().targets
    o = Outputs(kind(z), torch.tensor(y, dtype=torch.int8), 'abcde')
    assert o.logits.dtype == np.float64 and o.classes == tuple('abcde') and not o.is_multi
    np.testing.assert_allclose(o.logits, z, rtol=5e-3)
    np.testing.assert_allclose(o.probs, scipy.special.softmax(o.logits, 1))
    assert nll(o) == pytest.approx(skm.log_loss(y, o.probs, labels=range(5)))


def test_losses_of_several_classes():
    o = set_outputs()
    assert o.is_multi and nll(o) == pytest.approx(np.mean([skm.log_loss(t, p, labels=[False, True]) for t, p in zip(o.targets.T, o.probs.T)]))


def test_arrays_of_the_user_stay():
    z, y = outputs().logits, outputs().targets
    o = Outputs(z, y)
    o.logits[:] = 0
    assert z.std() > 1
    with pytest.raises(AttributeError): o.classes = ()


@pytest.mark.parametrize('z,y,classes,msg,remedy', [
    (np.zeros((0, 3)), [], None, 'logits are .0, 3.', (np.zeros((1, 3)), [0], None)),
    (np.zeros((2, 1)), [0, 0], None, r'logits are of 1 class, .* make the two \[0, z\]', (np.zeros((2, 2)), [0, 0], None)),
    (np.zeros((2, 3)), None, None, 'targets are object .*, but must be numbers', (np.zeros((2, 3)), [0, 1], None)),
    (np.zeros((2, 3)), [0], None, 'targets are .1,., but must be .2,. or .2, 3.', (np.zeros((2, 3)), [0, 1], None)),
    (np.zeros((2, 3)), [0, -1], None, 'target of item 1 is -1, but must be from 0 to 2: leave out', (np.zeros((1, 3)), [0], None)),
    (np.zeros((2, 3)), [0., 1.], None, r'targets are float64 .2,., .*y.long', (np.zeros((2, 3)), torch.tensor([0., 1.]).long(), None)),
    (np.zeros((2, 3)), [[0, .5, 1]]*2, None, 'a target is 0.5, but must be 0 or 1', (np.zeros((2, 3)), [[0, 1, 1]]*2, None)),
    ([[0, np.nan], [0, 1]], [0, 1], None, r'logits of item 0 are .*not finite, as are 1 of 2 items: leave', ([[0, 1]], [1], None)),
    ([[0, np.inf], [0, 1]], [0, 1], None, r'not finite', ([[0, 1]], [1], None)),
    (np.zeros((2, 3)), [0, 1], ['a'], r'classes has 1 names, but logits are .2, 3.: give 3', (np.zeros((2, 3)), [0, 1], 'abc')),
    ([['a', 'b']], [0], None, 'logits are <U1', ([[0, 1]], [0], None))])
def test_what_is_no_outputs(z, y, classes, msg, remedy):
    with pytest.raises(ValueError, match=msg): Outputs(z, y, classes)
    Outputs(*remedy)


single = [confusion, most_confused, plot_confusion, accuracy_of, top_losses, calibration, ece, brier, plot_calibration, coverage, plot_coverage,
          lambda o: mcnemar(o, o), lambda o: plot_highest_losses(o, [])]
several = [set_scores, threshold_scores, best_thresholds, plot_thresholds]


@pytest.mark.parametrize('f', single + several)
def test_a_learner_or_another_kind_of_targets(f):
    with pytest.raises(TypeError, match=r'takes an Outputs, not a Learner: give outputs_of\(learn\)'): f(synth_learner())
    o = set_outputs() if f in single else outputs()
    with pytest.raises(ValueError, match=r'targets are .*, but .* is for (one class|several classes) an item: use class_scores'): f(o)
    class_scores(o)


# from a Learner

def test_of_a_learner():
    learn = quiet(synth_learner())
    learn.fit(1)
    for ds_idx in (0, 1):
        o = outputs_of(learn, ds_idx)
        p, y = learn.get_preds(ds_idx)
        np.testing.assert_allclose(o.probs, p, atol=1e-6)
        np.testing.assert_array_equal(o.targets, y)
    same = outputs_of(learn, dl=learn.dls.valid)
    np.testing.assert_array_equal(same.logits, o.logits)
    for kwargs, msg in ((dict(ds_idx=2), 'ds_idx is 2'), (dict(ds_idx='valid'), "ds_idx is 'valid'")):
        with pytest.raises(ValueError, match=msg): outputs_of(learn, **kwargs)


images = np.random.default_rng(0).integers(0, 255, (24, 16, 20, 3), dtype=np.uint8)


def block_learner(target, get_y, loss, n_out=3, last=nn.Identity):
    torch.manual_seed(0)
    block = DataBlock((ImageBlock, target), get_x=lambda i: images[i], get_y=get_y, splitter=IndexSplitter(range(12)))
    dls = block.dataloaders(range(24), bs=5, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out), last())
    return quiet(Learner(dls, model, loss_func=loss))


def raw(learn): return learn.model.eval()(torch.from_numpy(images[:12]).permute(0, 3, 1, 2).float()/255).detach()


@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), FocalLossFlat(), nn.CrossEntropyLoss()], ids=lambda o: type(o).__name__)
def test_one_class(loss):
    o = outputs_of(learn := block_learner(CategoryBlock, lambda i: 'abc'[i%3], loss))
    np.testing.assert_allclose(o.logits, raw(learn), atol=1e-6)
    assert o.classes == tuple('abc') and list(o.targets) == [0, 1, 2]*4


@pytest.mark.parametrize('loss,last', [(BCEWithLogitsLossFlat(), nn.Identity), (nn.BCEWithLogitsLoss(), nn.Identity), (BCELossFlat(), nn.Sigmoid)])
def test_several_classes(loss, last):
    "Of a network that gives probabilities too"
    o = outputs_of(learn := block_learner(MultiCategoryBlock, lambda i: ['ab', 'b', 'c'][i%3], loss, last=last))
    want = raw(learn) if last is nn.Sigmoid else raw(learn).sigmoid()
    np.testing.assert_allclose(o.probs, want, atol=1e-6)
    assert o.is_multi and o.targets[:3].tolist() == [[True, True, False], [False, True, False], [False, False, True]]


def test_a_class_without_a_name():
    assert outputs_of(block_learner(CategoryBlock, lambda i: 'abc'[i%3], CrossEntropyLossFlat(), 5)).classes == ('a', 'b', 'c', '3', '4')


@pytest.mark.parametrize('target,get_y,found', [(RegressionBlock, lambda i: float(i), 'float32'), (MaskBlock(), lambda i: images[i, ..., 0]//128, 'int64')])
def test_targets_that_are_no_classes(target, get_y, found):
    learn = block_learner(target, get_y, CrossEntropyLossFlat())
    with pytest.raises(ValueError, match=f'the target of an item is torch.{found} .*outputs_of takes the number of one class, or 0 or 1 for each'): outputs_of(learn)


def test_no_targets():
    learn = block_learner(CategoryBlock, lambda i: 'abc'[i%3], CrossEntropyLossFlat())
    with pytest.raises(ValueError, match=r'an item has no target: .*with_labels=True'): outputs_of(learn, dl=learn.dls.test_dl([1, 2]))
    o = outputs_of(learn, dl=learn.dls.test_dl([1, 2], with_labels=True))
    assert list(o.targets) == [1, 2]


def test_of_a_table():
    df = pd.DataFrame(dict(a=np.arange(40.), y=['u', 'v']*20))
    dls = TabularDataLoaders.from_df(df, y_names='y', cont_names=['a'], procs=[Categorify, Normalize], bs=8, valid_idx=range(5, 25))
    o = outputs_of(learn := quiet(tabular_learner(dls, layers=[8])))
    assert o.classes == ('u', 'v') and list(o.targets) == [(5 + i)%2 for i in range(20)]
    np.testing.assert_allclose(o.probs, learn.get_preds()[0], atol=1e-6)


def test_of_texts():
    "Of several lengths, which the loader sorts; the order is that of the data set"
    from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
    df = pd.DataFrame(dict(text=['w '*(3 + 7*i%11) for i in range(24)], label=['pos', 'neg', 'neg']*8))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', bs=4, seed=0)
    learn = quiet(text_classifier_learner(dls, AWD_LSTM, pretrained=False, config={**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 8, 'n_layers': 1}))
    o = outputs_of(learn, 0)
    assert [o.classes[i] for i in o.targets] == list(learn.dls.train_ds.items.label)
    for i in (0, 5, 11): np.testing.assert_allclose(o.probs[i], learn.predict(learn.dls.train_ds.items.text.iloc[i])[2], atol=1e-5)


def test_the_learner_stays():
    "Its recorder, modes, generators and loaders, also where another loader is given"
    learn = quiet(synth_learner())
    learn.fit(1)
    learn.model.train()
    other = learn.dls.train.new(shuffle=True)

    def state():
        return (list(learn.recorder.lrs), list(learn.recorder.values), [m.training for m in learn.model.modules()], list(learn.cbs), torch.get_rng_state().tolist(),
                np.random.get_state()[1].tolist(), random.getstate(), [(dl.rng.getstate(), dl.shuffle) for dl in (*learn.dls.loaders, other)])
    before = state()
    for kwargs in (dict(ds_idx=0), dict(ds_idx=1), dict(dl=other)): outputs_of(learn, **kwargs)
    assert state() == before


# numbers

@sizes
def test_confusion(n, c):
    o = outputs(n, c)
    for by in (None, 'true', 'pred'):
        want = skm.confusion_matrix(o.targets, o.predicted, labels=range(c), normalize=by)
        np.testing.assert_allclose(np.nan_to_num(confusion(o, by)), want)


@sizes
def test_most_confused(n, c):
    o = outputs(n, c)
    m, df = skm.confusion_matrix(o.targets, o.predicted, labels=range(c)), most_confused(o)
    want = {(str(i), str(j)): (m[i, j], m[i, j]/m[i].sum()) for i in range(c) for j in range(c) if i != j and m[i, j]}
    assert list(df.columns) == ['true', 'predicted', 'count', 'rate']
    assert {row[:2]: row[2:] for row in df.itertuples(index=False, name=None)} == want
    assert df['count'].is_monotonic_decreasing


@sizes
@pytest.mark.parametrize('make', [outputs, set_outputs])
def test_class_scores(n, c, make):
    o = make(n, c)
    df = class_scores(o)
    want = skm.precision_recall_fscore_support(o.targets, o.predicted, labels=range(c), zero_division=np.nan)
    np.testing.assert_allclose(df[['precision', 'recall', 'f1', 'support']].to_numpy().T, np.array(want), atol=1e-12)


@pytest.mark.parametrize('level', [.5, .95, .999])
def test_wilson(level):
    for n in (1, 2, 7, 100, 10_000):
        for k in {0, 1, n//3, n - 1, n}:
            want = scipy.stats.binomtest(k, n).proportion_ci(level, 'wilson')
            np.testing.assert_allclose(wilson(k, n, level), (want.low, want.high), atol=1e-12)
    assert wilson(0, 0) == (0, 1) and deviations(level) == pytest.approx(scipy.stats.norm.interval(level)[1])
    o = outputs()
    right = int((o.predicted == o.targets).sum())
    want = scipy.stats.binomtest(right, 300).proportion_ci(level, 'wilson')
    assert accuracy_of(o, level) == pytest.approx((right/300, want.low, want.high))


@pytest.mark.parametrize('level', [0, 1, 95, None, '0.9'])
def test_bad_level(level):
    for f in (accuracy_of, plot_class_scores, plot_calibration, plot_coverage, lambda o, level: mcnemar(o, o, level), lambda o, level: wilson(1, 2, level)):
        with pytest.raises(ValueError, match='level is .*, but must be .*above 0 and below 1'): f(outputs(), level=level)


def test_top_losses():
    o = outputs()
    df = top_losses(o)
    want = sorted(range(300), key=lambda i: o.probs[i, o.targets[i]])
    assert list(df['index']) == want and df.loss[0] == pytest.approx(-np.log(o.probs[want[0], o.targets[want[0]]]))
    assert list(df.predicted) == [str(o.predicted[i]) for i in want] and list(df.prob) == [o.probs[i].max() for i in want]


@sizes
@pytest.mark.parametrize('n_bins', [1, 10, 15])
def test_calibration(n, c, n_bins):
    o = outputs(n, c)
    conf, right = o.probs.max(1), o.predicted == o.targets
    df = calibration(o, n_bins)
    some = df[df.n > 0]
    acc, mean = sklearn.calibration.calibration_curve(right, conf, n_bins=n_bins)
    np.testing.assert_allclose(some.accuracy, acc)
    np.testing.assert_allclose(some.confidence, mean)
    by_hand = sum(abs(right[i].sum() - conf[i].sum()) for b in range(n_bins) if len(i := np.flatnonzero((conf > b/n_bins) & (conf <= (b + 1)/n_bins))))/n
    assert ece(o, n_bins) == pytest.approx(by_hand)
    assert brier(o) == pytest.approx(skm.brier_score_loss(o.targets, o.probs, labels=range(c), scale_by_half=False) if c > 2 else 2*np.mean((o.probs[:, 1] - o.targets)**2))


@pytest.mark.parametrize('make', [outputs, set_outputs])
@pytest.mark.parametrize('size', [.001, 1, 5000])
def test_temperature(make, size):
    o = make()
    o = Outputs(o.logits*size, o.targets)
    t = fit_temperature(o)
    want = scipy.optimize.minimize_scalar(lambda v: nll(Outputs(o.logits/np.exp(v), o.targets)), (np.log(size) - 1, np.log(size) + 1), tol=1e-10)
    assert t == pytest.approx(np.exp(want.x), rel=1e-5)
    mended = with_temperature(o, t)
    assert nll(mended) <= nll(o) and (mended.predicted == o.predicted).all() and mended.classes == o.classes


def test_no_temperature():
    "And the advice: items with mistakes, targets in their order"
    o = outputs()
    right = o.predicted == o.targets
    with pytest.raises(ValueError, match='all of .* items are right, .*give more held-out items'): fit_temperature(Outputs(o.logits[right], o.targets[right]))
    for z in (-o.logits, np.zeros((300, 5))):
        with pytest.raises(ValueError, match='no better than chance'): fit_temperature(Outputs(z, o.targets))
    assert fit_temperature(o) > 0
    for t in (0, -1, None, np.nan, np.inf):
        with pytest.raises(ValueError, match='temperature is .*above 0'): with_temperature(o, t)


def test_coverage():
    o = outputs()
    conf, right = o.probs.max(1), o.predicted == o.targets
    for t, n, share, k, acc in coverage(o, [0, .3, .77, conf[5], 1]).itertuples(index=False, name=None):
        some = conf >= t
        assert (n, share, k) == (some.sum(), some.mean(), right[some].sum()) and (acc == right[some].mean() if n else np.isnan(acc))
    df = coverage(o)
    assert len(df) == len(set(conf)) and df.coverage.iloc[-1] == 1 and df.n.is_monotonic_increasing
    tied = coverage(Outputs(np.tile([[1., 0]], (4, 1)), [0, 0, 1, 0]))
    assert tied.n.tolist() == [4] and tied.accuracy.tolist() == [.75]


def test_set_scores():
    o = set_outputs()
    for t in (.2, .5, np.array([.1, .5, .7, 1])):
        s, pred = set_scores(o, t), o.probs > t
        for by in ('micro', 'macro'): assert getattr(s, f'f1_{by}') == pytest.approx(skm.f1_score(o.targets, pred, average=by))
        assert s[:2] == pytest.approx([f(o.targets, pred, average='micro') for f in (skm.precision_score, skm.recall_score)])
    for t in (-.1, 1.1, [.5]*3, np.nan):
        with pytest.raises(ValueError, match='threshold is .*give one number, or 4'): set_scores(o, t)


def test_best_thresholds():
    "Against all thresholds that make a difference"
    o = set_outputs(c=3)
    o = Outputs.of_probs(o.probs.round(2).clip(.01, .99), o.targets)  # many are equal
    for i, row in best_thresholds(o).iterrows():
        p, y = o.probs[:, i].round(6), o.targets[:, i]
        scores = [skm.f1_score(y, p > t) for t in np.append(0, np.unique(p)[:-1])]
        assert row.f1 == pytest.approx(max(scores)) and skm.f1_score(y, p > row.threshold) == pytest.approx(row.f1)
        assert (row.precision, row.recall) == pytest.approx((skm.precision_score(y, p > row.threshold), skm.recall_score(y, p > row.threshold)))
        assert row.f1_at_half == pytest.approx(skm.f1_score(y, p > .5))
    none = best_thresholds(Outputs(o.logits, np.zeros_like(o.targets)))
    assert none.threshold.isna().all() and none.f1.isna().all()


def test_mcnemar():
    a = outputs()
    rng = np.random.default_rng(1)
    for noise in (0, .1, 1, 3):
        b = Outputs(a.logits + rng.normal(0, noise, a.logits.shape), a.targets)
        c, right = mcnemar(a, b), [o.predicted == o.targets for o in (a, b)]
        k, n = (right[0] & ~right[1]).sum(), (right[0] != right[1]).sum()
        assert (c.only_a, c.only_b, c.n) == (k, n - k, 300) and c.p == pytest.approx(scipy.stats.binomtest(k, n).pvalue if n else 1)
        assert (c.accuracy_a, c.accuracy_b) == tuple(o.mean() for o in right) and c.difference.value == pytest.approx(c.accuracy_a - c.accuracy_b)
        back = mcnemar(b, a)
        assert back.difference.value == -c.difference.value and back.p == c.p and back.difference.low == pytest.approx(-c.difference.high)


def test_the_interval_of_the_difference_holds_its_level():
    "In 2,000 draws of 60 pairs, 95% within the error of so many draws"
    from s9_fastai.report.paired import _difference
    cells = [.5, .25, .1, .15]  # both right, only a, only b, none
    draws = np.random.default_rng(0).multinomial(60, cells, 2000)
    ends = [_difference(a, b, 60, .95) for _, a, b, _ in draws]
    assert .94 < np.mean([o.low <= .15 <= o.high for o in ends]) < .97


def test_other_items_are_refused():
    a, b = outputs(), outputs(seed=1)
    with pytest.raises(ValueError, match=r'the target of item \d+ is \d in a and \d in b: .*same order'): mcnemar(a, b)
    with pytest.raises(ValueError, match='a has 300 items, b 200: give outputs of the same items'): mcnemar(a, outputs(200))
    mcnemar(a, Outputs(b.logits, a.targets))


# pictures

def plots(o):
    "Each plot of `o` in a new figure"
    return [plot_class_scores, *([plot_thresholds] if o.is_multi else [plot_confusion, plot_calibration, plot_coverage])]


@pytest.mark.parametrize('o', [outputs(60, 12, names=hostile), outputs(1, 2), outputs(5, 2, signal=99), set_outputs(3, 2), set_outputs(c=12, names=hostile),
                               Outputs(np.zeros((4, 3)), [0]*4), outputs(40, 20, names=['W'*100]*20)], ids=repr)
def test_pictures_of_anything(o):
    "Names with any character, one item, nothing wrong, a class that is never there"
    before = plt.get_fignums()
    for f in plots(o):
        assert f(o)._repr_png_().startswith(b'\x89PNG') and plt.get_fignums() == before


@pytest.mark.parametrize('f', [plot_confusion, plot_class_scores, plot_calibration, plot_coverage])
def test_axes_of_the_user(f):
    fig, axs = plt.subplots(1, 2)
    assert f(outputs(), ax=axs[1]) is fig and not axs[0].has_data() and axs[1].has_data()
    fig.canvas.draw()
    plt.close(fig)


@pytest.mark.parametrize('f', [plot_confusion, plot_class_scores, plot_calibration, plot_coverage])
def test_a_part_of_a_figure(f):
    fig = plt.figure(layout='constrained')
    one, two = fig.subfigures(1, 2)
    assert f(outputs(), ax=two.subplots()) is fig and not one.axes
    fig.canvas.draw()
    plt.close(fig)


def test_labels():
    assert [label(nm) for nm in hostile] == ['$a', 'b_c', '"d"', "'e'", '$\\frac{1$', 'g\\x00\\n\\t', '\\u202edcba', 'i\\', 'j^{k', '%s {0}', 'W'*16 + '…' + 'W'*15, '']


def ticks(axis): return [o.get_text() for o in axis.get_ticklabels()]


@pytest.mark.parametrize('n,c,normalize', [(1, 2, 'true'), (50, 2, 'pred'), (300, 10, 'true'), (300, 10, 'pred'), (300, 10, None), (200, 40, None), (400, 100, 'true')])
def test_confusion_draws_the_numbers(n, c, normalize):
    o = outputs(n, c)
    fig, m = plot_confusion(o, normalize), confusion(o, normalize).to_numpy()
    ax, *bar = fig.axes
    assert len(bar) == (o.predicted != o.targets).any()
    right, wrong = (im.get_array().filled(np.nan) for im in ax.images)
    drawn = np.where(np.eye(c, dtype=bool), right, wrong)
    np.testing.assert_array_equal(np.nan_to_num(drawn), np.nan_to_num(m))
    off = np.nan_to_num(m*(1 - np.eye(c)))
    if off.any(): assert ax.images[1].get_clim() == (0, off.max()) and ax.images[1].norm.vmax < 1 + np.diag(np.nan_to_num(m)).max()
    fig.draw_without_rendering()
    if c <= 40:
        assert len(ax.texts) == (np.nan_to_num(m) > 0).sum()
        cell = ax.get_window_extent().width/c
        for t in ax.texts:
            j, i = t.get_position()
            want = m[i, j] if normalize is None else 100*m[i, j]
            assert t.get_text() == ('<1' if 0 < want < .5 else f'{want:.0f}')
            assert t.get_window_extent().width <= cell
    else: assert not ax.texts
    for axis in (ax.xaxis, ax.yaxis):
        boxes = [o.get_window_extent() for o in axis.get_ticklabels()]
        assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:])) and len(boxes) == c
    assert ticks(ax.yaxis) == list(o.classes)


def test_few_names_where_there_is_no_place():
    o = outputs(500, 100)
    fig, ax = plt.subplots(figsize=(3, 3))
    plot_confusion(o, ax=ax)
    step = 100//len(ticks(ax.yaxis)) if 100%len(ticks(ax.yaxis)) == 0 else -(-100//len(ticks(ax.yaxis)))
    assert step > 1 and ticks(ax.yaxis) == list(o.classes[::step]) and f'1 of {step} classes is named' in ax.get_xlabel() and not ax.texts
    plt.close(fig)


@sizes
@pytest.mark.parametrize('score', ['recall', 'precision'])
def test_class_scores_draw_the_numbers(n, c, score):
    o = outputs(n, c)
    ax = plot_class_scores(o, score).axes[0]
    df = class_scores(o).sort_values(score, ascending=False, kind='stable')
    np.testing.assert_allclose([p.get_width() for p in ax.patches], df[score])
    total = df.support if score == 'recall' else df.predicted
    want = [scipy.stats.binomtest(int(k), int(m)).proportion_ci(method='wilson') for k, m in zip(df.right, total) if m]
    np.testing.assert_allclose([s[:, 0] for s in ax.collections[0].get_segments()], [(w.low, w.high) for w in want], atol=1e-9)
    assert ticks(ax.yaxis) == [f'{nm} ({m:,})' for nm, m in zip(df['class'], total)]
    assert ax.lines[0].get_xdata()[0] == pytest.approx(np.nanmean(df[score]))


def test_calibration_draws_the_numbers():
    o = outputs(500)
    ax, df = plot_calibration(o, 10).axes[0], calibration(o, 10)
    some = df[df.n > 0]
    drawn = {ln.get_label(): ln.get_xydata() for ln in ax.lines}
    np.testing.assert_allclose(drawn['accuracy, 95% interval'], some[['confidence', 'accuracy']])
    np.testing.assert_allclose([p.get_height() for p in ax.patches], df.n/500)
    want = [scipy.stats.binomtest(round(a*n), int(n)).proportion_ci(method='wilson') for a, n in zip(some.accuracy, some.n)]
    np.testing.assert_allclose([s[:, 1] for s in ax.collections[0].get_segments()], [(w.low, w.high) for w in want], atol=1e-9)
    assert f'ECE {ece(o, 10):.2%}' in ax.get_title(loc='left')


def test_coverage_and_thresholds_draw_the_numbers():
    o, s = outputs(), set_outputs()
    np.testing.assert_allclose(plot_coverage(o).axes[0].lines[0].get_xydata(), coverage(o)[['coverage', 'accuracy']])
    df = threshold_scores(s)
    for line, nm in zip(plot_thresholds(s).axes[0].lines, df.columns[1:]): np.testing.assert_allclose(line.get_xydata(), df[['threshold', nm]])


def test_texts_are_apart():
    "The marks of a network that is right where it is sure, and the legend of one that is not sure enough"
    y = np.arange(300)%3
    fig = plot_coverage(Outputs(12.*np.eye(3)[y], np.where(np.arange(300) < 299, y, 2 - y)))
    fig.draw_without_rendering()
    ax = fig.axes[0]
    assert ax.texts and max(t.get_window_extent().y1 for t in ax.texts) < ax._left_title.get_window_extent().y0
    fig = plot_calibration(Outputs(np.linspace(0.3, 3, 300)[:, None]*np.eye(3)[y], y))  # always right
    fig.draw_without_rendering()
    ax = fig.axes[0]
    points, box = ax.transData.transform(ax.lines[1].get_xydata()), ax.get_legend().get_window_extent()
    assert len(points) > 5 and not box.count_contains(points)


def test_highest_losses_draw_the_images():
    imgs, y = synth_images(30)
    o = Outputs(np.random.default_rng(0).normal(0, 1, (30, 10)), y, hostile[:10])
    fig, df = plot_highest_losses(o, list(zip(imgs)), 5), top_losses(o)
    fig.draw_without_rendering()
    assert len(fig.axes) == 5
    for ax, row in zip(fig.axes, df.itertuples(index=False)):
        np.testing.assert_array_equal(ax.images[0].get_array(), imgs[row[0]])
        assert ax.get_title() == f'true: {label(row.true)} (loss {row.loss:.2f})\npredicted: {label(row.predicted)} ({percent(row.prob)})'
    with pytest.raises(ValueError, match='dset has 29 items, but must have 30, as outputs: give the same set'): plot_highest_losses(o, list(zip(imgs))[1:])
    with pytest.raises(TypeError, match='must be an image'): plot_highest_losses(o, [('text',)]*30)


@pytest.mark.parametrize('f,kwargs,msg', [(confusion, dict(normalize='all'), "normalize is 'all', but must be 'true' or 'pred'"), (plot_confusion, dict(normalize=True), 'normalize is True'),
                                          (plot_class_scores, dict(score='f1'), "score is 'f1', but must be 'recall' or 'precision'"),
                                          (calibration, dict(n_bins=0), 'n_bins is 0'), (plot_calibration, dict(n_bins=2.5), 'n_bins is 2.5'),
                                          (coverage, dict(thresholds=[90]), 'thresholds are .*give shares, not percent')])
def test_bad_arguments(f, kwargs, msg):
    with pytest.raises(ValueError, match=msg): f(outputs(), **kwargs)
