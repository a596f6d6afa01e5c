"""What of the package works with which Learner. Each check compares by value; `python tests/works_with.py` runs them all and writes the table
of the page "Works with", and `tests/test_works_with.py` runs them one by one."""
import inspect
import io
import json
import random
import re
import socket
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from functools import partial
from itertools import count, product
from pathlib import Path
from unittest.mock import patch

import albumentations as A
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import norm_bias_params
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from s9_fastai.augment.item import AlbumentationsTransform
from s9_fastai.training.ema import EMA
from s9_fastai.augment.batch import BatchAugment
from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.cifar.facts import CLASSES
from s9_fastai.core.weights import read_tensors
from s9_fastai.training.distill import TeacherLogits, Distill
from s9_fastai.report.mistakes import misclassified
from s9_fastai.training.muon import FastMuon
from s9_fastai.training.schedule import StepLR
from s9_fastai.report.summary import summary
from s9_fastai.test_utils import quiet

sys.path.insert(0, str(Path(__file__).resolve().parent))
import processes
import works_with_ranks
from works_with_learners import LEARNERS, classes, make, n_train

table = Path(__file__).resolve().parent/'data'/'works_with.json'
CHECKS, REFUSED = {}, {}  # by the name that the page gives the part; (part, Learner): (error, what its message has in it)


def check(part):
    "Registers the function as the check of `part`"
    def put(f):
        CHECKS[part] = f
        return f
    return put


def refuses(part, error, words, *learners):
    "Says that `part` refuses `learners`, and how"
    for learner in learners: REFUSED[part, learner] = error, words


def run(part, learner):
    """What the check of one cell has found, as a dict: whether the part `works` there, what was `found`, and a `note`, the error for what is refused,
    or None. An AssertionError where a value is wrong"""
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        if (part, learner) not in REFUSED:
            found = CHECKS[part](learner, Path(tmp))
            found, note = found if isinstance(found, tuple) else (found, None)
            return dict(works=True, found=found, note=note)
        error, words = REFUSED[part, learner]
        with pytest.raises(error, match=words) as refusal: CHECKS[part](learner, Path(tmp))
        note = re.sub(r'^Exception occured in .*?: ', '', ' '.join(str(refusal.value).split()))  # fastai puts that before it
        return dict(works=False, found='refused', note=note)


# --- what the checks share

def new(learner, **kwargs): return quiet(make(learner, **kwargs))


class Steps(Callback):
    "Keeps what `look` sees at `event`, and ends the fit after `n` times"
    order = 15  # after the optimizer has stepped, before `EMA` (20)
    def __init__(self, event, look, n=None):
        self.look, self.n, self.seen = look, n, []
        setattr(self, event, self.note)

    def note(self):
        self.seen.append(self.look(self.learn))
        if len(self.seen) == self.n: raise CancelFitException


def far(a, b): return ((a - b).abs().max()/b.abs().max().clamp_min(1e-12)).item()  # the largest difference, relative to the largest value
def tensors(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}
def bits(o): return b''.join(t.contiguous().cpu().numpy().tobytes() for t in o)


# --- fast layers

class Double(Callback):
    "Runs in float64"
    def before_fit(self): self.model.double()
    def before_batch(self): self.learn.xb, self.learn.yb = (tuple(o.double() if o.is_floating_point() else o for o in b) for b in (self.xb, self.yb))


def folds(out):
    "Does the gradient of `out` go through the fast batch norm?"
    fn, names = out.grad_fn, []
    while fn and len(names) < 3:
        names.append(fn.name())
        fn = fn.next_functions[0][0] if fn.next_functions else None
    return any('FoldedBatchNorm' in o for o in names)


def gradients(learner, to_fast, *cbs):
    """Of one batch, without the randomness of dropout, whose fast layer draws other numbers, and of ReLU, which rounding turns on or off here and
    there; and how many of the batch norms were fast"""
    learn, n = new(learner, bs=n_train), []
    look = lambda learn: {k: p.grad.clone() for k, p in learn.model.named_parameters() if p.grad is not None}
    steps = Steps('before_step', look, 1)
    for m in learn.model.modules():
        if isinstance(m, nn.Dropout): m.p = 0
        if isinstance(m, nn.BatchNorm2d): m.register_forward_hook(lambda m, x, out: n.append(folds(out)))
    if to_fast:
        for m in learn.to_fast().model.modules(): m.least = 0  # batch norms: the fast way for small batches too
    else: learn.add_cb(ChannelsLast())
    smooth = patch.object(nn.ReLU, 'forward', lambda m, x: F.silu(x, inplace=m.inplace))  # of the class: fastai's tables share one
    with smooth, patch('s9_fastai.training.fast.autocast_dtype', lambda device: torch.float32): learn.fit(1, cbs=[steps, *cbs])
    return steps.seen[0], sum(n), len(n)


@check('fast layers')
def check_fast_layers(learner, tmp):
    """`to_fast`: in float64 each gradient is that of torch's layers; in float32 all of them differ from these by at most 3e-6, relative to their norm,
    or by no more than those of torch's layers in float32 do"""
    (exact, *_), (got, *_) = (gradients(learner, o, Double()) for o in (False, True))
    floor = 1e-3*max(g.abs().max() for g in exact.values())  # where the true gradient is 0, both have the rounding errors of large sums
    worst = max(((got[k] - exact[k]).abs().max()/exact[k].abs().max().clamp_min(floor)).item() for k in exact)
    assert worst <= 1e-10, worst
    (plain, *_), (got, n, n_norms) = (gradients(learner, o) for o in (False, True))
    flat = lambda o: torch.cat([g.flatten() for g in o.values()])
    error, torchs = (((flat(o) - flat(exact)).norm()/flat(exact).norm()).item() for o in (got, plain))
    assert error <= max(3e-6, torchs), (error, torchs)
    assert n > 0 or not n_norms, 'no batch norm took the fast way'
    new(learner).to_fast().fit(1)  # and it trains in the number format of this CPU
    return f'{n} of {n_norms} batch norms fast, gradients within {error:.0e}' if n_norms else 'no batch norm to replace, the same gradients'


# --- checkpoint

class Break(Callback):
    "Breaks a fit off in its second epoch"
    order, is_on = 2000, True
    def after_batch(self):
        if Break.is_on and self.training and (self.epoch, self.iter) == (1, 0): raise SystemError('broken off')


def end_state(learn):
    opt = learn.opt.state_dict()['state']
    state = [*learn.model.state_dict().values(), *(s[k] for s in opt for k in sorted(s) if isinstance(s[k], torch.Tensor))]
    return bits(state), [[float(v) for v in row] for row in learn.recorder.values], [float(v) for v in learn.recorder.losses]


@check('checkpoint')
def check_checkpoint(learner, tmp):
    "`Checkpoint`, beside `EMA` and `StepLR`: broken off in its second epoch and resumed by a new Learner, a fit ends in the same bits as without a break"
    warnings.filterwarnings('error', message='.*cannot be saved')
    ends = []
    for folder, breaks, seed in (('whole', False, 0), ('broken', True, 0), ('broken', False, 1)):  # a new process has other random numbers
        learn, Break.is_on = new(learner), breaks
        torch.manual_seed(seed)
        try: learn.fit(2, cbs=[EMA(), StepLR(step_size=1), Checkpoint(tmp/folder), Break()])
        except SystemError: continue
        ends.append(end_state(learn))
    (whole, *rows), (resumed, *rows_resumed) = ends
    assert whole == resumed and rows == rows_resumed, (rows, rows_resumed)
    return f'{len(whole)//4:,} values, all bits the same'


# --- several processes

def on_two(learner, tmp):
    "What each of two processes ends with"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE='2', OMP_NUM_THREADS='1')
    group = [processes.Script(works_with_ranks.__file__, tmp, learner, **env, RANK=str(r), LOCAL_RANK=str(r)) for r in range(2)]
    for done in [p.end() for p in group]: assert done.returncode == 0, done.stderr
    return [read_tensors(tmp/f'{r}.safetensors')[0] for r in range(2)]


def text_note(learner):
    if learner != 'text classifier': return None
    return ('each process pads its part of a batch to the longest text in it, which a network that reads the padding notices: the texts of this check '
            'have one length')


@check('several processes')
def check_processes(learner, tmp):
    "`learn.distributed`: two epochs on two processes, with `sync_norm`, end with the weights, losses and metrics of one; in float64, without dropout"
    one, ranks = works_with_ranks.ends(works_with_ranks.fit(learner)), on_two(learner, tmp)
    assert torch.equal(ranks[0]['state'], ranks[1]['state'])
    worst = (ranks[0]['state'] - one['state']).abs().max().item()
    assert worst < 1e-9 and all((o['values'] - one['values']).abs().max() < 1e-5 for o in ranks), worst  # losses and metrics are float32
    return f'weights within {worst:.0e}', text_note(learner)


# --- EMA

@check('EMA')
def check_average(learner, tmp):
    "`EMA`: a fit ends with the moving average that its formula gives by hand, running statistics too"
    learn, steps, age = new(learner), Steps('after_step', lambda learn: tensors(learn.model)), 0.2
    learn.fit(2, cbs=[EMA(age), steps])
    want = {k: v.double() for k, v in steps.seen[0].items()}
    for n, state in enumerate(steps.seen[1:], 1):
        weight = 1 - (1 - 1/(n + 1))**(1/age - 1)
        want = {k: v + weight*(state[k].double() - v) if state[k].is_floating_point() else state[k].double() for k, v in want.items()}
    got = tensors(learn.model)
    worst = max(far(got[k].double(), want[k]) for k in want if want[k].numel())
    assert worst <= 1e-6 and any(far(steps.seen[-1][k].double(), want[k]) > 1e-4 for k in want if want[k].numel()), worst
    return f'{len(want)} tensors, within {worst:.0e}'


# --- Muon

def near_orthogonal(m):
    "`m` (rows, columns) with singular values near 1: Newton and Schulz's iteration as its authors write it"
    x = m/(m.norm() + 1e-7)
    if m.shape[0] > m.shape[1]: x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445*x + (-4.7750*a + 2.0315*(a @ a)) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def hidden_names(model, groups):
    "Names of the weights between the first and the last one in the optimizer's `groups`, without those of depthwise convolutions"
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    names = {id(p): k for k, p in model.named_parameters()}
    weights = [(names[id(p)], owners[id(p)]) for g in groups for p in g if p.ndim > 1 and p.shape[0] > 1]
    return {k for k, m in weights[1:-1] if not (isinstance(m, nn.modules.conv._ConvNd) and m.groups == m.in_channels > 1)}


def muon_step(p, step, lr, scale):
    m = step.flatten(1)
    return p - lr*near_orthogonal(m).view_as(p)*scale*max(m.shape)**0.5


@check('Muon')
def check_muon(learner, tmp):
    "`FastMuon`: two steps are those of a plain reference, Muon for the weights of hidden layers and Nesterov's SGD for all else"
    lr, mom, wd, scale = 0.02, 0.9, 0.1, 0.0133
    learn = new(learner, opt_func=partial(FastMuon, mom=mom, scale=scale), lr=lr, wd=wd)
    look = lambda learn: {k: (p.detach().clone(), p.grad.clone()) for k, p in learn.model.named_parameters() if p.grad is not None}
    before = Steps('before_step', look)
    learn.fit(1, cbs=[before, after := Steps('after_step', look, 2)])
    plain, worst = {id(p) for p in norm_bias_params(learn.model)}, 0  # not decayed, as in fastai
    hidden = hidden_names(learn.model, learn.opt.param_lists)
    decays = {k: id(p) not in plain for k, p in learn.model.named_parameters()}
    for k, ((p, g), (_, g2)) in {k: [o[k] for o in before.seen] for k in before.seen[0]}.items():
        avg = 0
        for g, got in ((g, after.seen[0][k][0]), (g2, after.seen[1][k][0])):
            avg = mom*avg + g
            start, step = p*(1 - lr*wd) if decays[k] else p, g + mom*avg
            want = muon_step(start, step, lr, scale) if k in hidden else start - lr*step
            worst, p = max(worst, ((got - want).abs().max()/(want - p).abs().max().clamp_min(1e-12)).item()), got
    assert worst <= 1e-3, worst
    n = len(hidden & before.seen[0].keys())
    return f'{n} matrices, {len(before.seen[0]) - n} other tensors, steps within {worst:.0e}'


# --- StepLR

@check('StepLR')
def check_step_lr(learner, tmp):
    "`StepLR`: in each batch, each parameter group has the learning rate that torch's `StepLR` gives it"
    learn = new(learner)
    steps = Steps('before_step', lambda learn: [h['lr'] for h in learn.opt.hypers])
    learn.fit(3, slice(1e-4, 1e-2), cbs=[StepLR(step_size=1, gamma=0.3), steps])
    opt = torch.optim.SGD([dict(params=[nn.Parameter(torch.zeros(1))], lr=lr) for lr in steps.seen[0]])
    sched, want = torch.optim.lr_scheduler.StepLR(opt, 1, 0.3), []
    for _ in range(3):
        want += [[g['lr'] for g in opt.param_groups]]*len(learn.dls.train)
        opt.step()
        sched.step()
    assert steps.seen == want and len({*map(tuple, want)}) == 3
    return f'{len(want)} batches, {len(want[0])} groups, the same'


# --- distillation

@check('distillation')
def check_distill(learner, tmp):
    "`Distill` in a `KeyedDL`: the loss of the first batch is the mean of the labels' and the teacher's, computed by hand"
    learn = new(learner, **({'keyed': True} if 'keyed' in known_options(learner) else {}))
    logits = torch.randn(n_train, 2 if learner == 'siamese' else 10, generator=torch.Generator().manual_seed(5)).half().float()
    seen = Steps('after_loss', lambda learn: (learn.xb[0].clone(), learn.yb[0].clone(), learn.pred.detach().clone(), learn.loss_grad.item()), 1)
    learn.fit(1, cbs=[Distill(TeacherLogits(logits), weight=0.7, temperature=3., spread=2.), seen])
    x, y, pred, got = seen.seen[0]
    items = torch.cat([b[0] for b in learn.dls.train.new(shuffle=False, drop_last=False)])
    which = [next(i for i, item in enumerate(items) if item.equal(o)) for o in x]  # found by their pixels
    teacher = logits - logits.mean(1, keepdim=True)
    teacher = (2*teacher/teacher.std()/3).softmax(1)[which]
    labels = -pred.log_softmax(1)[range(len(y)), y].mean()
    soft = 9*(teacher*(teacher.log() - (pred/3).log_softmax(1))).sum(1).mean()
    want = (0.3*labels + 0.7*soft).item()
    assert abs(got - want) <= 1e-5*want, (got, want)
    return f'loss {got:.4f} as by hand'


refuses('distillation', TypeError, 'leave Distill out', 'U-net', 'multi-label', 'points')
refuses('distillation', TypeError, 'use the loaders of cifar_dls', 'tabular', 'text classifier', 'language model')


# --- transforms

def known_options(learner): return inspect.signature(getattr(LEARNERS[learner], 'func', LEARNERS[learner])).parameters


moving = A.Compose([A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.8)])
colours, flips = A.Compose([A.RandomBrightnessContrast(p=0.8)]), A.Compose([A.HorizontalFlip(p=0.5)])
seeds = count()


def batches(learner, n_epochs=2, **kwargs):
    "All tensors of the training batches, by epoch, and of one validation, as bytes"
    dls = new(learner, **kwargs).dls
    random.seed(next(seeds))  # what else draws numbers makes no difference
    return [bits(t for b in dls.train for t in b) for _ in range(n_epochs)], bits(t for b in dls.valid for t in b)


def check_draws(learner, **kwargs):
    "Random, other in each epoch, the same with 0 and 2 workers; and the validation images stay as they are"
    (plain, _), plain_valid = batches(learner)
    (first, second), valid = batches(learner, **kwargs)
    assert first != plain and first != second and valid == plain_valid
    assert batches(learner, workers=2, **kwargs) == ([first, second], valid)


def only_colours(learner, error, **kwargs):
    "The draws of a pipeline that changes colours, and the message for one that moves the image away from what belongs to it"
    check_draws(learner, **{k: make_tfm(colours) for k, make_tfm in kwargs.items()})
    with pytest.raises(error) as refusal: batches(learner, **{k: make_tfm(moving) for k, make_tfm in kwargs.items()})
    return 'colour changes, the same with 0 and 2 workers', ' '.join(str(refusal.value).split())


@check('AlbumentationsTransform')
def check_albumentations(learner, tmp):
    "`AlbumentationsTransform` in a `DataBlock`: new draws in each epoch, the same with 0 and 2 workers, none in validation; masks and points follow their images"
    if 'item' not in known_options(learner): return AlbumentationsTransform(moving)(item_of(learner), split_idx=0)
    if learner == 'siamese': return only_colours(learner, TypeError, item=AlbumentationsTransform)
    check_draws(learner, item=AlbumentationsTransform(moving))
    if learner == 'points': check_points_move()
    return check_masks_fit(learner, item=AlbumentationsTransform(flips)) + ', points fit'*(learner == 'points')


def check_masks_fit(learner, **kwargs):
    "The masks of a U-net follow their images; what was checked, in words"
    if learner != 'U-net': return 'the same with 0 and 2 workers'
    for x, y in new(learner, norm=False, **kwargs).dls.train:
        assert ((255*x[:, 0]).round() > 128).tolist() == (y == 1).tolist()  # as `mask` makes it
    return 'the same with 0 and 2 workers, masks fit'


def check_points_move():
    "A point is flipped with its image; albumentations counts pixels, so that 0 becomes 31"
    pipes = None, A.Compose([A.HorizontalFlip(p=1)])
    (x, y), (flipped, z) = (new('points', item=AlbumentationsTransform(A.Compose([]), pipe)).dls.valid.one_batch() for pipe in pipes)
    assert (flipped == x.flip(3)).all() and (z - y*torch.tensor([-1, 1]) + torch.tensor([2/32, 0])).abs().max() < 1e-5


def item_of(learner):
    dls = new(learner).dls
    return dls.train.items.iloc[0] if learner == 'tabular' else dls.train_ds[0][0]


no_images = 'tabular', 'text classifier', 'language model'
refuses('AlbumentationsTransform', TypeError, 'takes a PILImage or a uint8 array', *no_images)


@check('BatchAugment')
def check_batch_augment(learner, tmp):
    "`BatchAugment` in a `DataBlock`: new draws in each epoch, the same with 0 and 2 workers, none in validation; masks follow their images"
    if 'batch' not in known_options(learner): return BatchAugment.from_compose(moving)(new(learner).dls.one_batch(), split_idx=0)
    if learner in ('points', 'siamese'): return only_colours(learner, TypeError, batch=BatchAugment.from_compose)
    check_draws(learner, batch=BatchAugment.from_compose(moving))
    return check_masks_fit(learner, batch=BatchAugment.from_compose(flips))


refuses('BatchAugment', TypeError, 'takes a TensorImage', *no_images)


# --- summary and interpretation

@check('summary')
def check_summary(learner, tmp):
    "`summary` of the Learner: the multiply-accumulates are half of what torch's `FlopCounterMode` counts (spectral norm added by hand), and every parameter is in it"
    learn = new(learner)
    x = tuple(o[:1] for o in learn.dls.one_batch()[:learn.dls.n_inp])
    s = summary(learn.model, input_data=x)
    learn.model.eval()
    plain = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)  # of fused recurrent layers and attention torch counts nothing
    with torch.no_grad(), plain[0], plain[1], FlopCounterMode(display=False) as counter: learn.model(*x)
    spectral = sum(m.weight.numel() + len(m.weight) for m in learn.model.modules() if hasattr(m, 'weight_u'))  # W·v, then u·Wv: not counted by torch
    assert s.macs == counter.get_total_flops()//2 + spectral, (s.macs, counter.get_total_flops()//2, spectral)
    assert s.params == sum(p.numel() for p in learn.model.parameters()) and summary(learn).params == s.params
    return f'{s.macs:,} MACs'


@check('interpretation')
def check_interpretation(learner, tmp):
    "`misclassified`: the wrong validation items and how sure the network was, as by hand from the outputs of the model"
    learn = new(learner)
    learn.fit(1, cbs=[])
    df = misclassified(learn)
    dl, want, names = learn.dls.valid.new(shuffle=False), {}, {'Net': CLASSES, 'siamese': ['False', 'True'], 'tabular': classes[:3]}.get(learner, classes)
    items = iter([*dl.get_idxs()])  # text loaders sort by length
    learn.model.eval()
    for *x, y in dl:
        with torch.no_grad(): probs = first(learn.model(*x)).softmax(1)
        for row, true, i in zip(probs.tolist(), y.flatten().tolist(), items):  # `items` last: zip must not take one too many
            at = max(range(len(row)), key=row.__getitem__)
            if at != true: want[i] = names[true], names[at], row[at]
    assert want and len(df) == len(want) and df.prob.is_monotonic_decreasing
    for row in df.itertuples():
        true, predicted, prob = want[row.index]
        assert (row.true, row.predicted) == (true, predicted) and abs(row.prob - prob) < 1e-5
    return f'{len(want)} mistakes'


refuses('interpretation', (TypeError, ValueError), 'class', 'U-net', 'multi-label', 'points', 'language model')


def first(o): return o[0] if isinstance(o, tuple) else o


# --- the table

def cells(): return list(product(CHECKS, LEARNERS))
def read(): return json.loads(table.read_text(encoding='utf-8'))


def write():
    "Run all checks and write the table, unless one fails; the number of those that do"
    rows, failed = {}, 0
    for part, learner in cells():
        start = time.time()
        try: row = run(part, learner)
        except (Exception, pytest.fail.Exception) as e:
            row, failed = dict(works='FAILED', found=f'{type(e).__name__}: {e}'[:300], note=None), failed + 1
        rows.setdefault(part, {})[learner] = row
        print(f'{time.time() - start:5.2f} s  {part} × {learner}:', *(o for o in row.values() if o), flush=True)
    if not failed: table.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return failed


if __name__ == '__main__': sys.exit(write())
