"""Two processes beside one: weights after an epoch of the sample, and with dropout the validation after some epochs over seeds

Dropout draws its masks by process, so there the question is whether the results differ by more than chance."""
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_line, options, parse, save, seeds_option
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.augment.keyed import make_keyed
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.training import distributed  # noqa: F401 (learn.distributed)


class Float64(Callback):
    "Trains in float64, where rounding does not hide a difference"
    def before_fit(self): self.learn.model.double()

    def before_batch(self):
        self.learn.xb = tuple(o.double() for o in self.xb)
        self.learn.yb = tuple(o.as_subclass(torch.Tensor) for o in self.yb)


def fit(seed, epochs, norm, dropout, exact=False, sync_norm=False):
    "The Learner of a run of `stated` on the sample; the same in one process as in several"
    set_seed(seed)
    recipe = get_recipe('stated', norm=norm, dropout=dropout, compute='plain')
    learn = s9_learner(cifar_dls('sample', bs=recipe.bs, seed=seed), recipe, cbs=[Float64()]*exact)
    for dl in learn.dls.loaders: make_keyed(dl)
    with learn.no_bar(), learn.no_logging(), learn.distributed(sync_norm=sync_norm): learn.fit(epochs)
    return learn


def work(rank, n, port, threads, file, kwargs):
    "The life of a process: rank 0 writes the weights and the last validation"
    torch.set_num_threads(threads)
    if n > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    learn = fit(**kwargs)
    if rank: return
    weights = torch.cat([p.detach().double().flatten() for p in learn.model.parameters()])
    last = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    np.savez(file, weights=weights.numpy(), ends=[float(last[k]) for k in ('valid_loss', 'valid_accuracy')])


def run(n, threads=1, **kwargs):
    "The weights of a run on `n` processes, and its last validation loss and accuracy"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ctx = multiprocessing.get_context('spawn')
    with TemporaryDirectory() as tmp:
        group = [ctx.Process(target=work, args=(r, n, port, threads, f'{tmp}/ends.npz', kwargs)) for r in range(n)]
        for p in group: p.start()
        for p in group: p.join()
        if any(p.exitcode for p in group): raise RuntimeError(f'a process has failed: {[p.exitcode for p in group]}')
        with np.load(f'{tmp}/ends.npz') as found: return found['weights'], found['ends'].tolist()


def weights_apart(args):
    "Rows: the largest difference of a weight after an epoch"
    cases = {f'{norm}, {kind}': dict(norm=norm, dropout=0., exact=kind == 'float64', sync_norm=norm == 'bn')
             for kind in ('float64', 'float32') for norm in ('gn', 'bn')}
    rows = []
    for nm, case in cases.items():
        seed, found = args.seeds[0], {}
        whole = run(1, seed=seed, epochs=1, **case)[0]
        found[f'{nm}, 2 processes'] = run(2, seed=seed, epochs=1, **case)[0]
        found[f'{nm}, 1 process with 2 threads'] = run(1, 2, seed=seed, epochs=1, **case)[0]
        rows += [make_line(k, 'largest difference of a weight', '', [float(abs(v - whole).max())], dict(case, seed=seed, epochs=1))
                 for k, v in found.items()]
    return rows


def with_dropout(args):
    "Rows: validation after `--epochs` epochs, with a value for each seed"
    case, rows = dict(norm='bn', dropout=args.dropout), []
    for n in (1, 2):
        ends = [run(n, seed=s, epochs=args.epochs, **case)[1] for s in args.seeds]
        settings = dict(case, processes=n, seeds=args.seeds, epochs=args.epochs)
        for nm, values in zip(('validation loss', 'validation accuracy'), zip(*ends)):
            rows.append(make_line(f'dropout {args.dropout}, {n} process{"es"*(n > 1)}', nm, '', [*values], settings))
    return rows


def main():
    p = options(__doc__.splitlines()[0])
    seeds_option(p, [0, 1, 2])
    p.add_argument('--epochs', type=int, default=10, help='epochs of a run with dropout')
    p.add_argument('--dropout', type=float, default=0.1, help='probability of dropout')
    args = parse(p)
    if len(args.seeds) < 2: p.error('--seeds names one seed, but a deviation needs 2 or more')
    apart, ends = weights_apart(args), with_dropout(args)
    save([*apart, *ends], args.out)
    print(*(f'{o["what"]:<45} {o["median"]:.1e}' for o in apart), sep='\n')
    for o in ends: print(f'{o["what"]:<25} {o["measure"]:<20} {mean(o["values"]):.4f} ± {stdev(o["values"]):.4f} (n = {o["n"]})')


if __name__ == '__main__': main()
