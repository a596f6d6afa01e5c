"Seconds of an epoch on a GPU by method, the network alone, and the curves of a training beside those of a CPU"
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check, options, root, save, show, make_line
from equality import MEASURES, welch
from methods import ArrayDataset, ForPIL, bare_epoch, bare_sgd, fast_net, fastai_dls, fixed_batch, test_pytorch, train_pytorch
from rounds import Source, write_pngs
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.augment.policies import get_policy
from s9_fastai.cifar.facts import MEAN, SIZE, STD, Cifar10, Split
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.readers import array_data
from s9_fastai.core.environment import get_device
from s9_fastai.data.arrays import split_dls
from s9_fastai.nets.net import Net
from s9_fastai.training.fast import autocast_dtype

CURVES = root/'benchmarks'/'results'/'gpu_curves.json'  # of a CPU
PARTS = 'epochs', 'curves', 'accuracy'


def now(device):
    "Seconds, once the device has done what it was given"
    if device.type == 'cuda': torch.cuda.synchronize(device)
    return perf_counter()


# ---- images


def random_images(n, n_test):
    "Noise in the place of CIFAR-10, for times alone"
    rng = np.random.default_rng(0)
    def split(n): return Split(rng.integers(0, 256, (n, SIZE, SIZE, 3), np.uint8), rng.integers(0, 10, n))
    return Cifar10(split(n), split(n_test), 'noise', f'noise-{n}')


def first(split, n): return Split(np.array(split.images[:n]), np.array(split.labels[:n]))


# ---- methods: each `make` takes the images, the batch size, the device and the workers, and returns a function that runs an epoch


class Clock(Callback):
    "Times the training part of an epoch"
    def __init__(self, device): self.device = device
    def before_train(self): self.start = now(self.device)
    def after_train(self): self.seconds = now(self.device) - self.start


def fit_once(learn, device):
    "One epoch of `learn` with its validation, without progress bars or printed rows"
    clock, start = Clock(device), now(device)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=clock)
    return {'epoch': now(device) - start, 'training': clock.seconds}


def our_learner(name, data, device, seed=None, graphs=False, **kwargs):
    "The Learner of the recipe called `name`, with its loaders"
    recipe = get_recipe(name, augment='batch', **kwargs)
    dls = split_dls(array_data(data), recipe.bs, seed=seed, device=device, policy=recipe.policy, augment='batch')
    learn = s9_learner(dls, recipe)
    return learn.to_graphs() if graphs else learn


def make_ours(data, bs, device, workers, name, graphs=False):
    return partial(fit_once, our_learner(name, data, device, graphs=graphs, bs=bs), device)


def make_fastai(data, bs, device, workers):
    "A `Learner` as in fastai's documentation, on PNG files"
    tmp = TemporaryDirectory()
    folder = Path(tmp.name)
    for nm, split in (('train', data.train), ('test', data.test)): write_pngs(split, range(len(split.labels)), folder/nm)
    dls = fastai_dls(Source('', folder, len(data.train.labels), len(data.test.labels)), bs, workers).to(device)
    learn = Learner(dls, Net().to(device), opt_func=partial(SGD, mom=0.9), lr=0.05, metrics=accuracy)
    learn.of_files = tmp  # removed with the Learner
    return partial(fit_once, learn, device)


class OnDevice:
    "The batches of a loader, on `device`"
    def __init__(self, loader, device): self.loader, self.device = loader, device
    def __iter__(self): return ([o.to(self.device) for o in b] for b in self.loader)


def make_pytorch(data, bs, device, workers):
    "A loop as in PyTorch's tutorials"
    aug = ForPIL(get_policy('reference', SIZE, MEAN).transforms), ForPIL([])
    train, test = (OnDevice(torch.utils.data.DataLoader(ArrayDataset(split, tfm), bs, shuffle=split is data.train, num_workers=workers), device)
                   for split, tfm in zip((data.train, data.test), aug))
    model = Net().to(device)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def run():
        start = now(device)
        train_pytorch(model, opt, train)
        trained = now(device)
        test_pytorch(model, test)
        return {'epoch': now(device) - start, 'training': trained - start}
    return run


class InAutocast(torch.nn.Module):
    "A network in `dtype`, without autocast's cache, which a CUDA graph does not allow"
    def __init__(self, net, dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x):
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False): return self.net(x)


def make_bare(data, bs, device, workers, graphs=False):
    "The limit of the training part: the network in its dtype, with a batch that is already there"
    net, dtype = fast_net(get_recipe('stated').dropout).train().to(device), autocast_dtype(device)
    opt, (xb, yb) = bare_sgd(net), (o.to(device) for o in fixed_batch(bs))
    model = torch.cuda.make_graphed_callables(InAutocast(net, dtype), (xb,)) if graphs else net
    steps = -(-len(data.train.labels)//bs)

    def run():
        start = now(device)
        bare_epoch(model, opt, xb, yb, steps, torch.float32 if graphs else dtype)
        return {'training': now(device) - start}
    return run


def flipped_shifted(x, most=2):
    "The images `x` (N, C, H, W), each mirrored with a chance of a half and moved by up to `most` pixels"
    n, _, h, w = x.shape
    x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x, x.flip(3))
    x = F.pad(x, (most,)*4, 'reflect')
    ys, xs = (torch.randint(2*most + 1, (n, 1), device=x.device) + torch.arange(o, device=x.device) for o in (h, w))
    return x[torch.arange(n, device=x.device)[:, None, None], :, ys[:, :, None], xs[:, None]].permute(0, 3, 1, 2)  # channels last in memory


def make_airbench(data, bs, device, workers):
    "In the manner of airbench: all images on the device, augmented once an epoch, and no wait for the device in the loop"
    mean, std = (torch.tensor(o, device=device)[:, None, None] for o in (MEAN, STD))
    (x, y), (x_test, y_test) = (
        (((torch.from_numpy(np.array(s.images)).to(device).permute(0, 3, 1, 2)/255 - mean)/std), torch.from_numpy(np.array(s.labels)).to(device))
        for s in (data.train, data.test))
    net = fast_net(0.).to(device)
    model = InAutocast(net, autocast_dtype(device))
    opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True)

    def run():
        start = now(device)
        net.train()
        seen = flipped_shifted(x)
        for i in torch.randperm(len(y), device=device).split(bs):
            F.cross_entropy(model(seen[i]).float(), y[i]).backward()
            opt.step()
            opt.zero_grad()
        trained = now(device)
        net.eval()
        with torch.no_grad(): right = sum((model(xb).argmax(1) == yb).sum() for xb, yb in zip(x_test.split(2000), y_test.split(2000)))
        assert 0 <= right.item() <= len(y_test)
        return {'epoch': now(device) - start, 'training': trained - start}
    return run


# name: title, how it is made, does it need CUDA?, is it measured with few images?
METHODS = {'stated': ('recipe stated', partial(make_ours, name='stated'), False, False),
           'fast': ('recipe fast', partial(make_ours, name='fast'), False, False),
           'fastai': ('fastai idiom', make_fastai, False, True),
           'pytorch': ('plain PyTorch', make_pytorch, False, True),
           'bare': ('bare network, batch already there', make_bare, False, False),
           'airbench': ('as airbench does it', make_airbench, False, False),
           'airbench-1024': ('as airbench does it, batches of 1,024', make_airbench, False, False),
           'bare-graphs': ('bare network, CUDA graphs', partial(make_bare, graphs=True), True, False),
           'stated-graphs': ('recipe stated, CUDA graphs', partial(make_ours, name='stated', graphs=True), True, False),
           'fast-graphs': ('recipe fast, CUDA graphs', partial(make_ours, name='fast', graphs=True), True, False)}


class Measured:
    "One method: its runs, or the error that ended it"
    def __init__(self, key, data, args):
        self.title, self.make, _, is_slow = METHODS[key]
        self.bs = 1024 if key.endswith('-1024') else args.bs
        self.data = Cifar10(first(data.train, args.few), first(data.test, args.few//5), *data[2:]) if is_slow else data
        self.settings = dict(method=key, bs=self.bs, images=len(self.data.train.labels), test_images=len(self.data.test.labels),
                             workers=args.workers if is_slow else 0, device=args.device.type, data=data.source)
        self.args, self.run, self.results, self.seconds, self.error = args, None, [], 0, None

    def once(self, counts):
        "One run, which makes what is needed first; is it kept?"
        start = perf_counter()
        try:
            if self.run is None: self.run = self.make(self.data, self.bs, self.args.device, self.settings['workers'])
            got = self.run()
        except Exception as e:
            self.error = f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}'
            return print(f'{self.title} failed: {self.error}', file=sys.stderr, flush=True)
        self.seconds = perf_counter() - start
        if counts: self.results.append(got)
        shown = '  '.join(f'{k} {v:.4g}' for k, v in got.items())
        print(f'{"round  " if counts else "warm-up"}  {self.title}: {shown}', file=sys.stderr, flush=True)

    def lines(self):
        "Rows of the results: seconds, and the images a second of the training part"
        if self.error: return [dict(what=self.title, measure='failed', error=self.error, settings=self.settings)]
        if not self.results: return []
        found = {k: [o[k] for o in self.results] for k in self.results[0]}
        rates = [self.settings['images']/o for o in found['training']]
        return [*(make_line(self.title, k, 's', v, self.settings) for k, v in found.items()),
                make_line(self.title, 'training', 'images/s', rates, self.settings)]


def interleave(methods, repeats, deadline):
    "A warm-up and `repeats` rounds of all `methods`; what would end after the `deadline` is left out"
    for rep in range(repeats + 1):
        for m in methods:
            if m.error: continue
            if perf_counter() + m.seconds > deadline: print(f'no time left for {m.title}', file=sys.stderr, flush=True)
            else: m.once(counts=rep > 0)


def epochs(args, data, deadline):
    "Times of all methods: rows"
    methods = [Measured(k, data, args) for k in args.methods]
    try: interleave(methods, args.repeats, deadline)
    finally: lines = save_now([o for m in methods for o in m.lines()], args.out)
    for unit, measure in (('s', 'epoch'), ('images/s', 'training')):
        rows = [o for o in lines if o['measure'] == measure and o['unit'] == unit]
        if unit == 's': rows = [o for o in rows if o['settings']['images'] == len(data.train.labels)]  # the same work
        if rows: show(rows, METHODS['stated'][0])
    return lines


def save_now(lines, folder):
    if lines: save(lines, folder)
    return lines


# ---- curves


def history(seed, n_epochs, device, graphs=False):
    "Losses and accuracy of each epoch on the embedded sample, by name"
    set_seed(seed)
    learn = our_learner('stated', load_cifar('sample'), device, seed, graphs)
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epochs)
    names = learn.recorder.metric_names[1:]
    return [{k: round(float(v), 6) for k, v in zip(names, row) if k in MEASURES} for row in learn.recorder.values]


def record_curves(args):
    "Write the curves of this CPU, which others are compared with"
    runs = {str(s): history(s, args.epochs, torch.device('cpu')) for s in args.seeds}
    CURVES.write_text(json.dumps(dict(recipe='stated', data='sample', dtype=str(autocast_dtype(torch.device('cpu'))), torch=torch.__version__, runs=runs), indent=1) + '\n')


def apart(ours, theirs):
    "The largest difference of two lists of curves, in standard errors, with its epoch and measure"
    found = []
    for e, nm in ((e, nm) for e in range(len(ours[0])) for nm in MEASURES):
        found.append((abs(welch([h[e][nm] for h in ours], [h[e][nm] for h in theirs])), e + 1, nm))
    return max(found)


def curves(args, data, deadline):
    "Curves of this device beside those recorded on a CPU: rows"
    recorded = json.loads(CURVES.read_text(encoding='utf-8'))['runs']
    seeds, lines = [int(s) for s in recorded][:2 if args.quick else None], []
    n_epochs = 1 if args.quick else len(recorded['0'])
    theirs = [recorded[str(s)][:n_epochs] for s in seeds]
    for graphs in (False, True)[:1 + ('stated-graphs' in args.methods)]:
        if perf_counter() > deadline: break
        title = METHODS['stated-graphs' if graphs else 'stated'][0]
        try: ours = [history(s, n_epochs, args.device, graphs) for s in seeds]
        except Exception as e:
            print(f'curves of {title} failed: {type(e).__name__}: {e}', file=sys.stderr)
            continue
        t, epoch, nm = apart(ours, theirs)
        print(f'curves of {title}: the largest of {n_epochs*len(MEASURES)} differences from the CPU is {t:.1f} standard errors ({nm} of epoch {epoch})')
        settings = dict(device=args.device.type, seeds=seeds, data='sample')
        lines += [make_line(title, f'curves {k}', 'last epoch', [h[-1][k] for h in ours], settings | dict(curves=[[o[k] for o in h] for h in ours]))
                  for k in MEASURES]
    return save_now(lines, args.out)


# ---- accuracy


def full_accuracy(args, data, deadline, rows):
    "The accuracy of `learn.fit(100)`, where the images are real and there is time: rows"
    if data.source == 'noise' or len(data.train.labels) < 50_000:
        return print('accuracy of fit(100) left out: it needs the full CIFAR-10, see --data')
    found = {o['settings']['method']: median(o['values']) for o in rows if o['measure'] == 'epoch'}
    key = min((k for k in ('stated', 'stated-graphs') if k in found), key=found.get, default=None)
    left = deadline - perf_counter()
    if key is None or 100*found[key]*1.05 > left: return print(f'accuracy of fit(100) left out: {left:.0f} s are left')
    set_seed(0)
    learn, start = our_learner('stated', data, args.device, 0, graphs=key.endswith('graphs')), perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(100)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    settings = dict(method=key, seed=0, epochs=100, seconds=round(perf_counter() - start, 1), device=args.device.type)
    line = make_line(METHODS[key][0], 'accuracy after fit(100)', '%', [100*row['valid_accuracy']], settings)
    print(f'fit(100): {line["median"]:.2f}% in {settings["seconds"]} s')
    return save_now([line], args.out)


# ---- the command


def parser():
    p = options(__doc__, repeats=3)
    p.set_defaults(out=Path(os.environ.get('OUT') or root/'benchmarks'/'results'))
    p.add_argument('--data', default=os.environ.get('S9_CIFAR10') or 'noise', help="CIFAR-10, 'sample', or 'noise' for as many random images")
    p.add_argument('--device', default='cuda', help='where the networks are trained')
    p.add_argument('--methods', nargs='+', choices=[*METHODS], default=[*METHODS], metavar='NAME', help=f'of {", ".join(METHODS)}')
    p.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS, metavar='PART', help=f'of {", ".join(PARTS)}')
    p.add_argument('--no-graphs', action='store_true', help='leave out the methods with CUDA graphs')
    p.add_argument('--bs', type=int, default=128, help='images a batch')
    p.add_argument('--few', type=int, default=10_000, help='training images for the methods that decode or augment image by image')
    p.add_argument('--workers', type=int, default=min(16, len(os.sched_getaffinity(0))), help='of those methods')
    p.add_argument('--seconds', type=float, default=480, help='nothing is begun that would end later than this')
    p.add_argument('--quick', action='store_true', help='few random images and rounds, to try the script out')
    p.add_argument('--record', action='store_true', help=f'write {CURVES.name} on this CPU, and end')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='of --record')
    p.add_argument('--epochs', type=int, default=8, help='of --record')
    return p


def parse():
    "The arguments, with what --quick and the device leave"
    p = parser()
    args = p.parse_args()
    if args.device.startswith('cuda') and not torch.cuda.is_available() and not args.record:
        p.error('no CUDA on this machine: run it where there is a GPU, or try it out with --device cpu --quick')
    if args.quick or args.data == 'noise': del args.data  # nothing that `check` could find
    args = check(p, args)
    args.device = get_device('cpu' if args.record else args.device)
    if args.quick: args.few, args.workers, args.repeats = 40, 0, 1
    args.methods = [k for k in args.methods if not METHODS[k][2] or args.device.type == 'cuda' and not args.no_graphs]
    return args


def images_of(args):
    if args.quick: return random_images(160, 32)
    return load_cifar(args.data) if 'data' in args else random_images(50_000, 10_000)


def main():
    begun = perf_counter()
    args = parse()
    if args.record: return record_curves(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` ends it so: what was measured is saved
    cv2.setNumThreads(0)
    data, deadline, rows = images_of(args), begun + args.seconds, []
    if 'curves' in args.parts: curves(args, data, begun + args.seconds/3)  # first: is it right at all?
    if 'epochs' in args.parts: rows = epochs(args, data, begun + args.seconds*2/3 if 'accuracy' in args.parts else deadline)
    if 'accuracy' in args.parts: full_accuracy(args, data, deadline, rows)
    print(f'{perf_counter() - begun:.0f} s', file=sys.stderr)


if __name__ == '__main__': main()
