"Several labels an image, and classes of unequal size: losses, metrics, run folders and predictions against torch and scikit-learn"
import json
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import IndexSplitter
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1ScoreMulti, accuracy_multi
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.data import ImageBlock
from fastcore.xtras import working_directory
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import nn

from s9_fastai.app.command import BadInput
from s9_fastai.app.inputs import class_counts, several_labels
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.predict import s9_predict
from s9_fastai.app.predictor import class_probabilities
from s9_fastai.app.recipe import get_recipe
from s9_fastai.app.run import open_run
from s9_fastai.app.train import s9_train
from s9_fastai.core.spec import ImageSpec, Split
from s9_fastai.core.weights import open_tensors
from s9_fastai.data.arrays import array_dls
from s9_fastai.data.loaders import image_dls
from s9_fastai.data.readers import ArrayData
from s9_fastai.report.plots import plot_curves
from s9_fastai.test_utils import quiet
from s9_fastai.training.balance import TrainingLoss, balance_weights
from s9_fastai.training.metrics import MacroF1, MeanRecall

TAGS = ('red', 'green', 'blue')


def tagged(n=48, size=24, seed=0):
    "Images that are brighter in the channels of their labels: about half have red, a third green, a sixth blue, and many none"
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 3)) < (1/2, 1/3, 1/6)).astype(np.uint8)
    y[:4] = [[1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]]
    x = rng.integers(0, 90, (n, size, size, 3)) + 120*y[:, None, None]
    return x.astype(np.uint8), y


def uneven(n=48, size=24, seed=0):
    "Images in three classes of very unequal sizes"
    y = np.repeat([0, 1, 2], [n - n//3, n//4, n//3 - n//4])
    x = np.random.default_rng(seed).integers(0, 120, (n, size, size, 3))
    x[np.arange(n), :, :, y] += 60
    return x.astype(np.uint8), y.astype(np.int64)


def labelled_dls(make, bs=8, valid=range(2, 48, 4), **kwargs):
    spec = ImageSpec(TAGS, 24, (0.4,)*3, (0.25,)*3)
    data = ArrayData((Split(*make()),), spec, 'a key', 'made up')
    return array_dls(data, valid, bs=bs, seed=1, device='cpu', policy='flip_crop', augment='batch', **kwargs)


SMALL = dict(n_channels=4, dropout=0., compute='plain')


def small_learner(make, run_dir=None, cbs=(), save_every=None, dls=None, **fields):
    set_seed(3)
    return quiet(s9_learner(dls or labelled_dls(make), get_recipe(**SMALL, **fields), run_dir, save_every, cbs=[*cbs]))


def last_row(learn): return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))


def tag_folder(path, labels=None):
    "Image files and a table of their labels"
    x, y = tagged()
    (path/'images').mkdir(parents=True)
    rows = ['file,tags,split']
    for i, (image, tags) in enumerate(zip(x, y)):
        Image.fromarray(image).save(path/'images'/f'{i:02}.png')
        rows.append(f'images/{i:02}.png,{" ".join(np.array(TAGS)[tags == 1])},{"valid" if i%4 == 2 else "train"}')
    (path/'tags.csv').write_text('\n'.join(rows) + '\n')
    return path/'tags.csv'


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path): monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'fastai'))


# --- metrics


class Fed:
    "What a metric reads of a Learner"
    def __init__(self, pred, y): self.pred, self.y, self.yb = pred, y, (y,)
    def to_detach(self, x): return x.detach()


def value(metric, pred, targ, bs=7):
    metric.reset()
    for o in zip(pred.split(bs), targ.split(bs), strict=True): metric.accumulate(Fed(*o))
    return metric.value


@pytest.mark.parametrize('n_classes, seed', [(2, 0), (3, 1), (10, 2), (40, 3)])
def test_means_over_classes_are_those_of_scikit_learn(n_classes, seed):
    "Also where a class has no item, or is predicted although no item has it"
    torch.manual_seed(seed)
    pred, targ = torch.randn(50, n_classes), torch.randint(0, max(2, n_classes - 1), (50,))
    pred[torch.arange(50), targ] += 1
    with pytest.warns() if n_classes > 2 else pytest.MonkeyPatch.context():  # of classes that are not among the targets
        recall = balanced_accuracy_score(targ, pred.argmax(1))
    assert value(MeanRecall(), pred, targ) == pytest.approx(recall)
    assert value(MacroF1(), pred, targ) == pytest.approx(f1_score(targ, pred.argmax(1), average='macro'))


@pytest.mark.parametrize('seed', range(3))
def test_macro_f1_of_several_labels_is_fastais(seed):
    torch.manual_seed(seed)
    pred, targ = torch.randn(50, 6), (torch.rand(50, 6) < 0.3).float()
    assert value(MacroF1(), pred, targ) == pytest.approx(value(F1ScoreMulti(), pred, targ))
    assert value(MacroF1(), pred, targ) == pytest.approx(f1_score(targ, pred.sigmoid() > 0.5, average='macro'))


def test_a_label_that_is_never_there_nor_predicted_has_no_f1():
    pred, targ = torch.tensor([[3., -3, -3], [3, -3, -3]]), torch.tensor([[1., 0, 0], [0, 0, 0]])
    assert value(MacroF1(), pred, targ) == pytest.approx(f1_score(targ, pred > 0, average='macro', zero_division=np.nan))
    assert value(MacroF1(), pred, targ) == pytest.approx(2/3)


# --- weights of classes


@pytest.mark.parametrize('balance', [0, 0.5, 1])
def test_weights_of_one_label_are_scikit_learns_with_mean_1(balance):
    from sklearn.utils.class_weight import compute_class_weight
    y = np.repeat([0, 1, 2], [50, 30, 4])
    w = balance_weights(dict(zip('abc', np.bincount(y).tolist())), balance)
    full = compute_class_weight('balanced', classes=np.arange(3), y=y)**balance
    torch.testing.assert_close(w/w[0], torch.tensor(full/full[0]).float())
    assert w[y].mean().item() == pytest.approx(1)


def torch_fit(learn, loss):
    "The weights after an epoch in torch's own loop, and the mean of the training losses"
    net, batches = learn.model, [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x, y in learn.dls.train]
    opt, losses = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), []
    net.train()
    for x, y in batches:
        opt.zero_grad()
        losses.append(loss(net(x), y)*len(x))
        losses[-1].div(len(x)).backward()
        opt.step()
    return [p.detach() for p in net.parameters()], torch.stack(losses).sum().item()/sum(len(x) for x, _ in batches)


@pytest.mark.parametrize('balance', [0., 0.7])
@pytest.mark.parametrize('make', [tagged, uneven])
def test_the_step_is_torchs_with_the_weights_and_the_validation_loss_has_none(make, balance):
    plain = F.binary_cross_entropy_with_logits if make is tagged else F.cross_entropy
    y = np.delete(make()[1], range(2, 48, 4), 0)
    k = torch.tensor(y.sum(0, dtype=np.int64) if make is tagged else np.bincount(y))
    kw = dict(pos_weight=((36 - k)/k)**balance) if make is tagged else dict(weight=(12/k)**balance)
    weights, loss = torch_fit(small_learner(make, balance=balance), lambda x, y: plain(x, y, **kw))
    unlike, _ = torch_fit(small_learner(make, balance=balance), lambda x, y: plain(x, y))
    learn = small_learner(make, balance=balance)
    learn.fit(1)
    off, far = (max((a - b).abs().max().item() for a, b in zip(o, learn.model.parameters(), strict=True)) for o in (weights, unlike))
    assert off < 2e-5 and (not balance or far > 100*off)
    found = last_row(learn)
    assert found['train_loss'] == pytest.approx(loss, rel=1e-5)
    with torch.no_grad(): logits = [(learn.model.eval()(x), y) for x, y in learn.dls.valid]
    logits, targ = (torch.cat([o.as_subclass(torch.Tensor) for o in part]) for part in zip(*logits))
    assert found['valid_loss'] == pytest.approx(plain(logits, targ).item(), rel=1e-5)
    if make is tagged:
        assert found['valid_accuracy_multi'] == pytest.approx(((logits > 0) == targ.bool()).float().mean().item())
        assert found['valid_macro_f1'] == pytest.approx(f1_score(targ, logits > 0, average='macro', zero_division=np.nan))
    elif balance: assert found['valid_macro_f1'] == pytest.approx(f1_score(targ, logits.argmax(1), average='macro'))


def test_balance_finds_a_rare_class_sooner():
    found = []
    for balance in (0., 1.):
        learn = small_learner(uneven, balance=balance, epochs=3)
        learn.add_cb(TrainingLoss(lambda *o: learn.loss_func(*o))) if not balance else None
        learn.metrics = [MeanRecall()]
        learn.fit(3)
        found.append(learn.get_preds(ds_idx=0)[0][:, 2].mean().item())  # probability of the rarest class
    assert found[1] > 1.5*found[0]


# --- loaders


def test_counts_are_those_of_the_arrays():
    for make in (tagged, uneven):
        dls, (_, y) = labelled_dls(make), make()
        for i, part in enumerate((np.delete(y, range(2, 48, 4), 0), y[2:48:4])):
            k = part.sum(0) if make is tagged else np.bincount(part, minlength=3)
            assert class_counts(dls, i) == dict(zip(TAGS, k.tolist()))
        assert several_labels(dls) == dls.source.spec.is_multi == (make is tagged)


def own_block(path, block, get_y):
    return DataBlock((ImageBlock, block), get_items=lambda p: sorted(p.rglob('*.png')), get_y=get_y, splitter=IndexSplitter(range(2, 48, 4))).dataloaders(
        path, bs=8, device='cpu', num_workers=0)


def test_loaders_of_fastai_are_taken_too(tmp_path):
    tag_folder(tmp_path)
    y = tagged()[1]
    dls = own_block(tmp_path, MultiCategoryBlock, lambda p: [TAGS[i] for i in np.flatnonzero(y[int(p.stem)])])
    learn = small_learner(None, dls=dls, balance=0.5)
    learn.fit(1)
    assert [*learn.recorder.metric_names[3:-2]] == ['train_accuracy_multi', 'valid_accuracy_multi', 'train_macro_f1', 'valid_macro_f1']
    assert sorted(learn.predict(dls.train_ds.items[0])[0]) == sorted(np.array(dls.vocab)[learn.predict(dls.train_ds.items[0])[2] > 0.5])
    one = own_block(tmp_path, CategoryBlock, lambda p: TAGS[int(p.stem)%3])
    assert not several_labels(one) and small_learner(None, dls=one).metrics[0].name == 'accuracy'
    numbers = own_block(tmp_path, RegressionBlock(n_out=3), lambda p: (y[int(p.stem)]/2).tolist())
    assert not several_labels(numbers)
    with pytest.raises(ValueError, match='up to 0.5, but the recipe'): small_learner(None, dls=numbers)


@pytest.mark.parametrize('times, is_uneven', [(1, False), (3, True)])
def test_means_over_classes_are_shown_where_classes_are_uneven(tmp_path, times, is_uneven):
    x, _ = uneven()
    for i in range(16 + 16//times):
        c = 'ab'[i >= 16]
        (tmp_path/'photos'/c).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).save(tmp_path/'photos'/c/f'{i}.png')
    dls = image_dls(tmp_path/'photos', size=24, bs=8, seed=1, device='cpu', valid_pct=0.25, cache_dir=tmp_path/'cache')
    names = [m.name for m in small_learner(None, dls=dls).metrics]
    assert names == ['accuracy', 'balanced_accuracy', 'macro_f1'][:3 if is_uneven else 1]
    assert [m.name for m in small_learner(None, dls=dls, balance=0.1).metrics] == ['accuracy', 'balanced_accuracy', 'macro_f1']


# --- a run that stops


class Break(Callback):
    order, not_saved = 2000, True
    def __init__(self, epoch, batch): self.at = epoch, batch
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == self.at: raise SystemError('broken off')


@pytest.mark.parametrize('make, at', [(tagged, (1, 2)), (tagged, (2, 0)), (uneven, (1, 2))])
def test_a_run_resumes_to_the_bit(tmp_path, make, at):
    fields = dict(balance=0.7)
    whole = small_learner(make, tmp_path/'whole', save_every=1, **fields)
    whole.fit(3)
    with pytest.raises(SystemError): small_learner(make, tmp_path/'part', [Break(*at)], save_every=1, **fields).fit(3)
    again = small_learner(make, tmp_path/'part', save_every=1, **fields)
    again.fit(3)
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True): assert torch.equal(a, b)
    a, b = (pd.read_csv(tmp_path/nm/'history.csv').drop(columns='time') for nm in ('whole', 'part'))
    assert len(a) == 3 and a.equals(b)
    assert (tmp_path/'part'/'log.txt').exists() == (make is uneven)  # which has the accuracy
    plot_curves(tmp_path/'part'/'history.csv', tmp_path/'curves.png', again.recorder.lrs)
    assert Image.open(tmp_path/'curves.png').size == (1000, 330)


def test_another_balance_is_another_run(tmp_path):
    small_learner(uneven, tmp_path, balance=0.5).fit(1)
    with pytest.raises(ValueError, match='balance was 0.5, is 0.7'): small_learner(uneven, tmp_path, balance=0.7).fit(2)


# --- the commands


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run of the command on a table with several labels an image, and what it printed"
    tmp, out = tmp_path_factory.mktemp('tags'), StringIO()
    table = tag_folder(tmp)
    with pytest.MonkeyPatch.context() as m, redirect_stdout(out):
        m.setenv('FASTAI_HOME', str(tmp/'fastai'))
        learn = s9_train(table, out=tmp/'run', delim=' ', size=24, bs=8, epochs=4, policy='flip_crop', augment='batch', balance=0.5, **SMALL)
    return tmp/'run', learn, out.getvalue()


def test_the_command_trains_on_several_labels(run):
    path, learn, out = run
    assert {p.name for p in path.iterdir()} == {'checkpoints', 'curves.png', 'history.csv', 'recipe.json', 'report.html', 'split.csv', 'weights.safetensors'}
    row, y = pd.read_csv(path/'history.csv').iloc[-1], tagged()[1][2::4]
    assert f'macro F1 {row.valid_macro_f1:.2%} on the validation images after 4 epochs\n' in out
    assert f'{row.valid_accuracy_multi:.2%} of their labels are right; predicting none gives {1 - y.mean():.2%}\n' in out
    assert 'misclassified.png is left out: it is for one label an image\n' in out
    assert json.loads((path/'recipe.json').read_text())['balance'] == 0.5
    targ = torch.tensor(y[:, ::-1].copy())  # the classes are sorted by name
    pred = learn.get_preds()[0]
    assert row.valid_macro_f1 == pytest.approx(f1_score(targ, pred > 0.5, average='macro', zero_division=np.nan))
    assert row.valid_accuracy_multi == pytest.approx(accuracy_multi(pred, targ, sigmoid=False).item())


def test_predictions_are_sigmoids_of_each_class(run, tmp_path):
    path, _, _ = run
    files, out = sorted((path.parent/'images').iterdir()), StringIO()
    with redirect_stdout(out): s9_predict(path.parent/'images', run=path, top=2)
    found = class_probabilities(files, path)
    net, spec = open_run(path).net()
    assert spec.is_multi and spec.classes == tuple(sorted(TAGS))
    x = spec.batch(tagged()[0])
    with torch.no_grad(): want = ((net(x) + net(x.flip(3)))/2).sigmoid()
    torch.testing.assert_close(torch.tensor([[*o.values()] for o in found]), want, atol=1e-5, rtol=1e-4)
    for f, probs, line in zip(files, found, out.getvalue().splitlines(), strict=True):
        best = sorted(probs.items(), key=lambda o: -o[1])
        above = [o for o in best if o[1] > 0.5]
        texts = ', '.join(f'{c} {p:.1%}' for c, p in above or best[:2])
        assert line == f'{f}: {texts}' if above else f'{f}: none above 50%: {texts}'
    assert '%' in out.getvalue()


def test_a_finished_run_stays_as_it_is(run, monkeypatch):
    path, learn, _ = run
    monkeypatch.setenv('FASTAI_HOME', str(path.parent/'fastai'))
    before, out = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}, StringIO()
    with redirect_stdout(out): s9_train(resume=path)
    assert 'is finished: it has had its 4 epochs, and its files are unchanged' in out.getvalue()
    assert before == {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


def test_headers_without_the_field_are_of_one_label(run):
    with open_tensors(run[0]/'weights.safetensors') as file: about = file.about
    assert ImageSpec.of_header(about).is_multi
    del about['is_multi']
    assert not ImageSpec.of_header(about).is_multi
    for bad in ('1', '"true"', 'null'):
        with pytest.raises(ValueError, match='no image spec in the header .*is_multi is'): ImageSpec.of_header({**about, 'is_multi': bad})


@pytest.mark.parametrize('field', ['label_smoothing', 'distill'])
def test_terms_for_one_label_are_refused(tmp_path, fault, field):
    "And the remedy trains"
    msg = f'{field} is 0.1, but an image can have several labels here, and {field} is for one label an image: set {field}=0'
    with pytest.raises(ValueError, match=msg) as e: small_learner(tagged, **{field: 0.1})
    fault('training', f's9_learner with {field} and several labels an image', e.value)
    with working_directory(tmp_path), pytest.raises(BadInput, match=msg):
        s9_train(tag_folder(tmp_path/'data'), out='run', delim=' ', size=24, bs=8, epochs=1, **{field: 0.1}, **SMALL)
    assert not (tmp_path/'run').exists()
    small_learner(tagged, **{field: 0.}).fit(1)


# --- wrong input


def test_balance_is_refused_where_it_cannot_be(tmp_path):
    "And the remedy trains"
    with pytest.raises(ValueError, match='balance is 2, but must be of type float|balance is 2, but must be 0 to 1'): get_recipe(balance=2)
    with pytest.raises(ValueError, match='balance is -0.5, but must be 0 to 1'): get_recipe(balance=-0.5)
    recipe = get_recipe(**SMALL, balance=0.5)
    with pytest.raises(ValueError, match='balance is 0.5, and there is a loss_func of your own'): s9_learner(labelled_dls(uneven), recipe, loss_func=CrossEntropyLossFlat())
    weights = balance_weights(class_counts(labelled_dls(uneven)), 0.5)
    quiet(s9_learner(labelled_dls(uneven), get_recipe(**SMALL), loss_func=CrossEntropyLossFlat(weight=weights))).fit(1)
    with pytest.raises(ValueError, match='mix_up mixes labels in the loss of the Learner'): small_learner(uneven, cbs=[MixUp()], balance=0.5).fit(1)
    small_learner(uneven, cbs=[MixUp()], balance=0.).fit(1)
    items = [(TensorImage(torch.zeros(3, 24, 24)), i%3) for i in range(8)]
    plain = DataLoaders(*[TfmdDL(items, bs=4) for _ in '12'])
    plain.c = 3
    with pytest.raises(ValueError, match='labels are not apart from the images: take a DataBlock'): s9_learner(plain, recipe)
    quiet(s9_learner(plain, get_recipe(**SMALL))).fit(1)


def test_a_class_without_images_has_no_weight():
    dls = labelled_dls(uneven, valid=range(44, 48))  # all images of the rarest class
    with pytest.raises(ValueError, match='none of the training images has the class blue, so it has no weight'): small_learner(None, dls=dls, balance=0.5)
    small_learner(None, dls=dls, balance=0.).fit(1)


def test_arrays_decide_whether_an_image_has_several_labels():
    x, y = tagged()
    spec = ImageSpec(TAGS, 24, (0.4,)*3, (0.25,)*3)
    assert ArrayData((Split(x, y),), spec, '', '').spec == ImageSpec(**{**asdict(spec), 'is_multi': True})
    assert ArrayData((Split(x, y[:, 0].astype(np.int64)),), ImageSpec(**{**asdict(spec), 'is_multi': True}), '', '').spec == spec


def test_own_networks_are_checked_for_the_number_of_labels():
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3*24*24, 4))
    with pytest.raises(ValueError, match=r'puts out \[2, 4\] .* but these loaders have 3 classes'): s9_learner(labelled_dls(tagged), get_recipe(), model=wide)
    quiet(s9_learner(labelled_dls(tagged), get_recipe(), model=nn.Sequential(nn.Flatten(), nn.Linear(3*24*24, 3)))).fit(1)
