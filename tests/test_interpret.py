"""The pictures of a run: what is drawn, what is saved, and that looking leaves the Learner as it was"""
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.data import ImageBlock, MaskBlock, PointBlock
from fastcore.basics import noop
from PIL import Image
from torch import nn
from torch.nn import functional as F

from s9_fastai.cifar.facts import CLASSES, MEAN, STD, Cifar10, Split
from s9_fastai.cifar.loaders import cifar_block
from s9_fastai.report.mistakes import misclassified, plot_misclassified, untouched
from s9_fastai.report.plots import plot_curves, read_history, save_picture
from s9_fastai.app.learner import s9_learner
from s9_fastai.test_utils import synth_split


def learner(run_dir=None, n_valid=30, **kwargs):
    "A quiet Learner on synthetic images, with the strongest augmentation of the experiment on the training set"
    trn, val = synth_split(40, n_valid)
    data = Cifar10(Split(*trn), Split(*val), 'synthetic', '0'*16)
    block, items = cifar_block(data, 'reference'), range(40 + n_valid)
    dls = block.dataloaders(items, bs=16, seed=0, num_workers=0, device='cpu', drop_last=False)
    torch.manual_seed(0)
    learn = s9_learner(dls, run_dir=run_dir, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = noop
    return learn


def history(n):
    "What `n` epochs might leave"
    e = np.arange(1, n + 1)
    return pd.DataFrame(dict(epoch=e, train_loss=2/e, valid_loss=1.8/e, train_accuracy=1 - 0.7/e,
                             valid_accuracy=1 - 0.6/e, lr=0.05*0.5**(e//20), time='00:01'))


class Oracle(nn.Module):
    "Recognises each image by its mean colour and says its class plus `shift`, the surer the later the item"
    def __init__(self, dset, shift):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.means = torch.stack([torch.from_numpy(np.array(x)).double().mean((0, 1))/255 for x, _ in dset])  # (N, 3)
        self.said = (torch.tensor([int(y) for _, y in dset]) + shift) % 10  # (N,)

    def forward(self, x):
        seen = x.as_subclass(torch.Tensor).double().mean((2, 3))*torch.tensor(STD) + torch.tensor(MEAN)  # (B, 3)
        item = (seen[:, None] - self.means).abs().sum(-1).argmin(1)  # (B,)
        return nn.functional.one_hot(self.said[item], 10)*(1 + item[:, None]/10)  # (B, 10)


def oracle(shift, ds_idx=1):
    "A Learner whose model is wrong by `shift` classes, an int or one for each item of set `ds_idx`"
    learn = learner()
    learn.model = Oracle(learn.dls[ds_idx].dataset, shift)
    return learn


# curves

def lines(ax): return {o.get_label(): o.get_xydata() for o in ax.lines}


def test_curves_draw_the_numbers():
    df = history(30)
    loss, acc, lr = plot_curves(df).axes
    for ax, col, scale in ((loss, 'loss', 1), (acc, 'accuracy', 100)):
        for part, nm in (('train', 'training'), ('valid', 'validation')):
            np.testing.assert_allclose(lines(ax)[nm], np.stack([df.epoch, scale*df[f'{part}_{col}']], 1))
    np.testing.assert_allclose(lines(acc)['validation accuracy at the end: 98.00%'], [[30, 98]])
    np.testing.assert_allclose(lr.lines[0].get_xydata(), df[['epoch', 'lr']])
    assert [o.get_title(loc='left') for o in (loss, acc, lr)] == ['loss', 'accuracy in %', 'learning rate']


@pytest.mark.parametrize('n', [1, 2, 100, 200])
def test_curves_of_any_length(n, tmp_path):
    fig = plot_curves(history(n), tmp_path/'c.png')
    for ax in fig.axes: assert all(t == int(t) for t in ax.get_xticks())
    assert Image.open(tmp_path/'c.png').size == (1000, 330)


@pytest.mark.parametrize('epochs,per_epoch', [(1, 1), (1, 40), (3, 7), (100, 390)])
def test_curves_of_rates_by_batch(epochs, per_epoch):
    "Each at the end of its batch; the last one of an epoch is over the epoch's dot"
    lrs = np.random.default_rng(0).random(epochs*per_epoch)/5
    ax = plot_curves(history(epochs), lrs=list(lrs)).axes[2]
    x, y = ax.lines[0].get_xydata().T
    np.testing.assert_array_equal(y, lrs)
    np.testing.assert_allclose(x[per_epoch - 1::per_epoch], range(1, epochs + 1))
    np.testing.assert_allclose(np.diff(x), 1/per_epoch)
    low, high = ax.get_xlim()
    assert low < x[0] and x[-1] < high and ax.get_ylim()[0] == 0 and lrs.max() < ax.get_ylim()[1] < 1.2*lrs.max()


@pytest.mark.parametrize('n', [0, 5, 7])
def test_rates_that_do_not_fit_the_epochs(n):
    with pytest.raises(ValueError, match=f'lrs has {n} rates for 3 epochs'): plot_curves(history(3), lrs=[.1]*n)


def test_rates_of_a_learner(tmp_path):
    "Also of a run that was resumed, which the table of its history begins with"
    learn = learner(tmp_path)
    learn.fit(2)
    longer = learner(tmp_path)
    longer.fit(3)
    for o, n in ((learn, 2), (longer, 3)):
        ax = plot_curves(pd.read_csv(tmp_path/'history.csv')[:n], lrs=o.recorder.lrs).axes[2]
        np.testing.assert_allclose(ax.lines[0].get_xdata(), np.arange(1, 3*n + 1)/3)


def test_one_epoch_is_visible():
    for ax in plot_curves(history(1)).axes: assert all(o.get_marker() not in ('', 'None') for o in ax.lines)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_curves_without_numbers(bad):
    df = history(4)
    fig = plot_curves(df.assign(train_loss=bad, valid_loss=[1, bad, 2, bad], valid_accuracy=bad))
    assert fig._repr_png_().startswith(b'\x89PNG')
    assert not any('at the end' in nm for nm in lines(fig.axes[1]))
    assert np.isfinite(fig.axes[0].get_ylim()).all()


def test_curves_leave_the_history_alone():
    df = history(3).assign(train_loss=np.inf)
    before = df.copy()
    plot_curves(df)
    pd.testing.assert_frame_equal(df, before)


@pytest.mark.parametrize('n', [1, 2, 30, 100])
def test_curves_text_is_apart(n):
    fig = plot_curves(history(n))
    fig.draw_without_rendering()
    # only the ticks in view
    ticks = [t.label1 for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for t in axis._update_ticks()]
    texts = [o for ax in fig.axes for o in (ax._left_title, ax.xaxis.label)] + ticks
    boxes = [o.get_window_extent() for o in [*fig.legends, *texts] if o.get_visible()]
    assert len(boxes) > 15 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(fig.legends[0].get_window_extent().overlaps(ax.bbox) for ax in fig.axes)


@pytest.mark.parametrize('text, msg', [('', 'No columns'), ('epoch,lr\n1,0.1\n', 'not in index'),
                                       ('\x00\xff', 'not a history'),
                                       (history(2).assign(lr='x').to_csv(index=False), 'could not convert'),
                                       (history(0).to_csv(index=False), 'no epoch in it')])
def test_bad_history(text, msg, tmp_path):
    path = tmp_path/'history.csv'
    path.write_text(text, encoding='latin-1')
    with pytest.raises(ValueError, match=msg) as e: plot_curves(path)
    assert str(path) in str(e.value)


def test_no_history(tmp_path):
    for path in (tmp_path, tmp_path/'no.csv'):
        with pytest.raises(FileNotFoundError, match='give the history.csv'): read_history(path)


# files and figures

def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path/'new'/'run'/'c.png'
    plot_curves(history(3), path)
    old = path.read_bytes()
    fig = plot_curves(history(5))

    def half(f, **kwargs):
        f.write_bytes(b'half')
        raise OSError('disk full')
    monkeypatch.setattr(fig, 'savefig', half)
    with pytest.raises(OSError, match='disk full'): save_picture(fig, path)
    assert path.read_bytes() == old and [o.name for o in path.parent.iterdir()] == ['c.png']


def test_no_figure_is_left_open(tmp_path):
    before = plt.get_fignums()
    plot_curves(history(3))
    plot_misclassified(learner(), path=tmp_path/'m.png')
    assert plt.get_fignums() == before


def test_without_a_display(tmp_path):
    "A backend that needs windows is asked for, and none is there"
    history(3).to_csv(tmp_path/'history.csv', index=False)
    code = "import sys; from s9_fastai.report.plots import plot_curves; plot_curves(*sys.argv[1:])"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, tmp_path/'history.csv', tmp_path/'c.png'], check=True,
                   env={**{k: v for k, v in os.environ.items() if k != 'DISPLAY'}, 'MPLBACKEND': 'TkAgg'})
    assert Image.open(tmp_path/'c.png').size == (1000, 330)


# wrong predictions

def slow_mistakes(learn, dset):
    "The reference: one image after the other, by `predict`"
    rows = []
    for i, (x, y) in enumerate(dset):
        said, _, probs = learn.predict(np.array(x))
        if said != CLASSES[y]: rows.append((i, CLASSES[y], said, probs.max().item()))
    return sorted(rows, key=lambda o: -o[-1])


@pytest.mark.parametrize('ds_idx', [0, 1])
def test_misclassified_equals_the_slow_way(ds_idx):
    "On the training set too, which is shuffled and augmented while it trains"
    learn = learner()
    learn.fit(2)
    df = misclassified(learn, ds_idx)
    slow = slow_mistakes(learn, learn.dls[ds_idx].dataset)
    assert list(df.columns) == ['index', 'true', 'predicted', 'prob'] and len(df) == len(slow) > 5
    by_index = df.sort_values('index').itertuples(index=False, name=None)
    for fast, ref in zip(by_index, sorted(slow)):
        assert fast[:3] == ref[:3] and fast[3] == pytest.approx(ref[3], abs=1e-5)
    np.testing.assert_allclose(df.prob, [o[3] for o in slow], atol=1e-5)


def test_misclassified_of_known_mistakes():
    shift = torch.zeros(30, dtype=int)
    shift[[3, 17, 22]] = torch.tensor([1, 2, 5])
    learn = oracle(shift)
    df, ys = misclassified(learn), learn.dls.valid_ds.tls[1]
    assert list(df['index']) == [22, 17, 3]
    assert list(df.true) == [CLASSES[ys[i]] for i in (22, 17, 3)]
    assert list(df.predicted) == [CLASSES[(ys[i] + k) % 10] for i, k in ((22, 5), (17, 2), (3, 1))]
    np.testing.assert_allclose(df.prob, [np.exp(v)/(np.exp(v) + 9) for v in (3.2, 2.7, 1.3)], rtol=1e-5)


def test_equal_confidence_keeps_the_order():
    learn = learner()
    for p in learn.model.parameters(): nn.init.zeros_(p)
    df = misclassified(learn)
    assert set(df.predicted) == {CLASSES[0]} and df['index'].is_monotonic_increasing


def test_a_diverged_model_is_shown():
    learn = learner()
    for p in learn.model.parameters(): nn.init.constant_(p, np.nan)
    assert len(plot_misclassified(learn, 4).axes) == 4


# the grid

@pytest.mark.parametrize('n, grid', [(1, 1), (2, 2), (9, 9), (25, 25), (29, 29), (1000, 30)])
def test_grid_shows_the_files_pixels(n, grid, tmp_path):
    learn = oracle(1)
    fig, dset = plot_misclassified(learn, n, path=tmp_path/'m.png'), learn.dls.valid_ds
    assert len(fig.axes) == grid
    pixels = np.asarray(Image.open(tmp_path/'m.png').convert('RGB'))
    for ax, i in zip(fig.axes, misclassified(learn)['index']):
        x = np.array(dset[i][0])
        left, low, right, top = (round(v) for v in ax.get_window_extent().extents)
        assert (right - left, top - low) == (128, 128)
        drawn = pixels[len(pixels) - top:len(pixels) - low, left:right]
        np.testing.assert_array_equal(drawn, x.repeat(4, 0).repeat(4, 1))


def test_grid_titles():
    learn = oracle(1)
    df = misclassified(learn)
    titles = [ax.get_title() for ax in plot_misclassified(learn, 3).axes]
    assert titles == [f'true: {o.true}\npredicted: {o.predicted} ({round(100*o.prob)}%)' for o in df[:3].itertuples()]


@pytest.mark.parametrize('n', [1, 3, 25])
@pytest.mark.parametrize('name', ['automobile', 'soft-coated_wheaten_terrier', 'W'*100, 'costs $5 and $6_a'])
def test_grid_text_is_apart(name, n):
    learn = oracle(1)
    learn.dls.vocab.items[:] = [name]*10
    fig = plot_misclassified(learn, n)
    fig.draw_without_rendering()
    drawn = [fig.texts[0]] + [o for ax in fig.axes for o in (ax.title, ax.patch)]
    boxes = [o.get_window_extent() for o in drawn]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(o.x0 >= 0 and o.y0 >= 0 and o.x1 <= fig.bbox.x1 and o.y1 <= fig.bbox.y1 for o in boxes)


def test_nothing_wrong(tmp_path):
    fig = plot_misclassified(oracle(0), path=tmp_path/'m.png')
    assert not fig.axes and fig.texts[0].get_text() == 'None of 30 images is misclassified'
    fig.draw_without_rendering()
    box = fig.texts[0].get_window_extent()
    assert box.x0 > 0 and box.x1 < fig.bbox.x1 and (tmp_path/'m.png').exists()
    assert misclassified(oracle(0)).empty


@pytest.mark.parametrize('n', [0, -1, 2.5, '3', True, None])
def test_bad_n(n):
    with pytest.raises(ValueError, match='n is .*at least 1'): plot_misclassified(learner(), n)


@pytest.mark.parametrize('ds_idx', [2, -1, None, 'valid'])
def test_bad_ds_idx(ds_idx):
    with pytest.raises(ValueError, match='ds_idx is .*from 0 to 1'): misclassified(learner(), ds_idx)


ramp = np.arange(40*60).reshape(40, 60)  # as an image: from black to white
colours = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1)/2399


def plot_one(x, monkeypatch):
    "The picture of a data set with one item, which is misclassified"
    mistake = dict(index=[0], true=['a'], predicted=['b'], prob=[.5])
    monkeypatch.setattr('s9_fastai.report.mistakes.misclassified', lambda *_: pd.DataFrame(mistake))
    return plot_misclassified(SimpleNamespace(dls=[None, SimpleNamespace(dataset=[(x, 0)])]))


@pytest.mark.parametrize('x,want', [
    (Image.fromarray((ramp//10).astype(np.uint8)), ramp//10/255), ((ramp//10).astype(np.uint8)[..., None], ramp//10/255),
    (Image.fromarray((ramp*20).astype(np.uint16)), ramp*20/65535), (ramp > 99, ramp > 99), (ramp, ramp/2399),
    (colours, colours), (colours.astype(np.float32)*4 - 2, colours), (torch.from_numpy(colours).permute(2, 0, 1), colours),
    (torch.from_numpy(colours).permute(2, 0, 1).bfloat16()*3, None), (torch.from_numpy(ramp/2399)[None], ramp/2399),
    (Image.fromarray((255*colours).astype(np.uint8)).convert('CMYK'), None), (np.zeros((4, 4)), np.zeros((4, 4))),
    (Image.fromarray(np.uint8([[0, 1]])).convert('P'), None), (np.zeros((600, 400, 4), np.uint8), np.zeros((600, 400, 4)))], ids=str)
def test_images_of_any_kind(x, want, monkeypatch):
    "Drawn from 0 to 1, black to white"
    ax = plot_one(x, monkeypatch).axes[0].images[0]
    got, (low, high) = np.asarray(ax.get_array(), dtype=float), ax.get_clim()
    assert (low, high) == (0, 255 if ax.get_array().dtype == np.uint8 else 1)
    if want is not None: np.testing.assert_allclose(got/high, want, atol=1e-6)


@pytest.mark.parametrize('x', ['text', None, torch.zeros(20), np.zeros((2, 8, 8, 3)), np.zeros((8, 8), complex), np.zeros((8, 8, 5))], ids=str)
def test_items_that_are_no_images(x, monkeypatch):
    with pytest.raises(TypeError, match='item 0 is .* must be an image .*misclassified.learn. gives'): plot_one(x, monkeypatch)


# other data

images = np.random.default_rng(0).integers(0, 255, (24, 16, 20, 3), dtype=np.uint8)


def block_learner(target, get_y, n_out=3, **kwargs):
    "A small convolutional Learner on 12 validation images of a plain `DataBlock`"
    torch.manual_seed(0)
    block = DataBlock((ImageBlock, target), get_x=lambda i: images[i], get_y=get_y, splitter=IndexSplitter(range(12)))
    dls = block.dataloaders(range(24), bs=5, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_out)), **kwargs)
    learn.remove_cb(learn.progress)
    return learn


class Never(nn.Module):
    def forward(self, x): raise AssertionError('predicted')


@pytest.mark.parametrize('target,get_y,model,loss,found', [
    (MultiCategoryBlock, lambda i: ['ab', 'b', 'c'][i%3], nn.LazyLinear(3), BCEWithLogitsLossFlat(), r'float32 \(3,\)'),
    (RegressionBlock, lambda i: float(i), nn.LazyLinear(1), MSELossFlat(), r'float32 \(\)'),
    (PointBlock, lambda i: torch.tensor([[1., 2.], [3., 4.]]), nn.LazyLinear(4), MSELossFlat(), r'float32 \(2, 2\)'),
    (MaskBlock(codes=['a', 'b']), lambda i: images[i, ..., 0]//128, None, CrossEntropyLossFlat(axis=1), r'int64 \(16, 20\)')], ids=['labels', 'number', 'points', 'mask'])
def test_other_targets_are_refused_at_once(target, get_y, model, loss, found):
    "And the advice works"
    learn = block_learner(target, get_y, loss_func=loss)
    learn.model = Never()
    for f in (misclassified, plot_misclassified):
        with pytest.raises(ValueError, match=rf'the target of an item is torch.{found}: misclassified takes .*with_loss=True'): f(learn)
    learn.model = nn.Sequential(nn.Flatten(), model) if model else nn.Conv2d(3, 2, 1)
    assert [len(o) for o in learn.get_preds(with_loss=True)] == [12]*3


def by_hand(learn, name):
    "The mistakes of the validation images, one by one"
    rows = []
    for i in range(12):
        x = torch.from_numpy(images[i]).permute(2, 0, 1)[None].float()/255
        with torch.no_grad(): probs = learn.model.eval()(x)[0].softmax(0)
        if probs.argmax() != i%3: rows.append((i, name(i%3), name(int(probs.argmax())), probs.max().item()))
    return sorted(rows, key=lambda o: -o[-1])


def same_mistakes(got, want):
    got = list(got.itertuples(index=False, name=None))
    assert [o[:3] for o in got] == [o[:3] for o in want] and len(got) > 5
    np.testing.assert_allclose([o[3] for o in got], [o[3] for o in want], rtol=1e-5)


@pytest.mark.parametrize('names,n_out,loss', [
    (['x', 'y', 'z'], 3, None), ([1, 2, 3], 3, None), ([.5, 1.5, 2.5], 3, None),
    (['x', 'y', 'z'], 5, None), (['x', 'y', 'z'], 3, nn.CrossEntropyLoss()), (['x', 'y', 'z'], 3, F.cross_entropy)])
def test_classes_of_any_kind(names, n_out, loss):
    "Losses of torch have no activation; a class beyond the names is a number"
    learn = block_learner(CategoryBlock(vocab=names, sort=False), lambda i: names[i%3], n_out, loss_func=loss)
    same_mistakes(misclassified(learn), by_hand(learn, lambda k: names[k] if k < len(names) else k))


def test_classes_without_names():
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()/255
    items = [(o, torch.tensor(i%3)) for i, o in enumerate(x)]
    learn = block_learner(CategoryBlock, lambda i: i%3)
    learn.dls = DataLoaders.from_dsets(items[12:], items[:12], bs=5, num_workers=0, device='cpu')
    assert not hasattr(learn.dls, 'vocab')
    same_mistakes(misclassified(learn), by_hand(learn, int))


def test_one_class():
    assert misclassified(block_learner(CategoryBlock, lambda i: 'a', 1)).empty


def test_one_output_for_two_classes():
    learn = block_learner(CategoryBlock, lambda i: i%2, 1, loss_func=BCEWithLogitsLossFlat())
    with pytest.raises(ValueError, match=r'the outputs are \(12, 1\): misclassified takes one for each class'): misclassified(learn)


def test_no_items_and_other_loaders():
    learn = block_learner(CategoryBlock, lambda i: i%3)
    learn.dls.loaders[1] = learn.dls.valid.new([])
    with pytest.raises(ValueError, match='no items: choose the other with ds_idx'): misclassified(learn)
    assert len(misclassified(learn, 0)) > 0
    learn.dls.loaders[1] = [(torch.zeros(1), torch.zeros(1))]
    with pytest.raises(TypeError, match='the loader is a list, but must be a DataLoader of fastai'): misclassified(learn)


def test_tabular():
    y = ['u', 'v']*20
    df = pd.DataFrame(dict(a=np.arange(40.), y=y))
    dls = TabularDataLoaders.from_df(df, y_names='y', cont_names=['a'], procs=[Categorify, Normalize], bs=8, valid_idx=range(5, 25))
    learn = tabular_learner(dls, layers=[8])
    learn.remove_cb(learn.progress)
    got = misclassified(learn)
    probs = learn.get_preds()[0]
    assert set(got['index']) == {i for i in range(20) if 'uv'[probs[i].argmax()] != y[5 + i]} and list(got.true) == [y[5 + i] for i in got['index']]
    with pytest.raises(TypeError, match='must be an image'): plot_misclassified(learn)


def test_texts():
    "Of several lengths, which the loader sorts; the index is that of the data set"
    from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
    df = pd.DataFrame(dict(text=['w '*(3 + 7*i%11) for i in range(24)], label=['pos', 'neg', 'neg']*8))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', bs=4, seed=0)
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config={**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 8, 'n_layers': 1})
    learn.remove_cb(learn.progress)
    got = misclassified(learn, 0)
    assert list(got.true) == [learn.dls.train_ds.items.label.iloc[i] for i in got['index']] and len(got) > 3
    assert set(got.predicted) <= {'pos', 'neg'} and all(got.true != got.predicted)


# looking leaves no trace

def state(learn):
    "All that a user may look at afterwards"
    rec = learn.recorder
    return (list(rec.values), list(rec.lrs), list(rec.losses), list(rec.iters), list(rec.metric_names),
            list(rec.log), list(learn.final_record), list(learn.cbs),
            learn.epoch, learn.training, learn.logger, learn.pct_train, learn.train_iter,
            [m.training for m in learn.model.modules()],
            [p.tolist() for p in learn.model.state_dict().values()])


@pytest.mark.parametrize('ds_idx', [0, 1])
def test_learner_is_as_it_was(tmp_path, ds_idx):
    learn = learner(tmp_path, path=tmp_path, cbs=SaveModelCallback(monitor='valid_accuracy'))
    learn.fit(2)
    learn.model.train()
    learn.model.fc.eval()  # one layer unlike the others
    before, files = state(learn), {o.name: o.read_bytes() for o in tmp_path.iterdir() if o.is_file()}
    rates, best = learn.step_lr.__dict__.copy(), learn.save_model.best
    plot_misclassified(learn, 3, ds_idx)
    assert state(learn) == before and learn.save_model.best == best and learn.step_lr.__dict__ == rates
    assert {o.name: o.read_bytes() for o in tmp_path.iterdir() if o.is_file()} == files
    assert {'log.txt', 'history.csv'} <= set(files)


def test_training_goes_on_the_same():
    "Two Learners, one of them looked at between its fits, end with the same weights"
    res = []
    for look in (False, True):
        learn = learner()
        learn.fit(1)
        if look: misclassified(learn, 0)
        torch.manual_seed(1)
        learn.fit(1)
        res.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*res)


@pytest.mark.parametrize('ds_idx', [0, 1])
def test_random_states_and_loaders_stay(ds_idx):
    learn = learner()
    def randomness(): return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
                              [(dl.rng.getstate(), dl.epoch, dl.n_new) for dl in learn.dls.loaders])
    before = randomness()
    plot_misclassified(learn, 2, ds_idx)
    assert randomness() == before


def test_put_back_after_an_error():
    learn = learner()
    learn.fit(1)
    before = state(learn)
    with pytest.raises(RuntimeError, match='stop'), untouched(learn):
        learn.get_preds()
        assert not learn.recorder.lrs
        raise RuntimeError('stop')
    assert state(learn) == before


def test_before_any_fit():
    "A Learner that was loaded and never trained can be looked at, and trained afterwards"
    learn = learner()
    plot_misclassified(learn, 2)
    assert not hasattr(learn.recorder, 'values')
    learn.fit(1)
    assert len(learn.recorder.values) == 1


def test_the_bar_and_the_table_stay(capsys):
    learn = learner()
    learn.add_cb(ProgressCallback())
    learn.logger = print
    learn.fit(1)
    bar, state = learn.progress, vars(learn.progress).copy()
    capsys.readouterr()
    misclassified(learn)
    assert learn.progress is bar and vars(bar) == state and learn.logger is print
    assert 'valid_loss' not in capsys.readouterr().out
