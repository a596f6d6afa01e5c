"""A fit of a Learner of works_with_learners.py, in float64 and without dropout: `works_with_ranks.py FOLDER LEARNER` writes what it has led to, on the
processes of a launcher's variables"""
import sys
from itertools import product
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib

from s9_fastai.augment.keyed import make_keyed
from s9_fastai.core.weights import write_tensors
from s9_fastai.training import distributed  # noqa: F401 (learn.distributed)
from s9_fastai.test_utils import quiet

sys.path.insert(0, str(Path(__file__).resolve().parent))
from works_with_learners import even_sentence, make

chances = 'p', 'weight_p', 'embed_p', 'input_p', 'hidden_p', 'output_p', 'drop_prob'  # of dropout, in torch, fastai and timm


class Double(Callback):
    "Runs in float64"
    order = -100
    def before_fit(self): self.model.double()
    def before_batch(self): self.learn.xb, self.learn.yb = (tuple(o.double() if o.is_floating_point() else o for o in b) for b in (self.xb, self.yb))


def without_dropout(model):
    for m, nm in product(model.modules(), chances):
        if isinstance(getattr(m, nm, None), float): setattr(m, nm, 1e-30)  # with 0 fastai's weight dropout fails


def fit(learner):
    "The Learner after two epochs, of one process or of several, each with weights and random numbers of its own before the fit"
    learn = quiet(make(learner, **(dict(text=even_sentence) if learner == 'text classifier' else {})))
    without_dropout(learn.model)
    for dl in learn.dls.loaders: make_keyed(dl)
    torch.manual_seed(rank_distrib())
    if rank_distrib():
        with torch.no_grad(): [p.add_(1) for p in learn.model.parameters()]
    with learn.distributed(sync_norm=True): learn.fit(2, cbs=Double())
    return learn


def ends(learn):
    "Weights, running statistics, and the rows of the Recorder"
    state = torch.cat([o.detach().double().flatten() for o in learn.model.state_dict().values()])
    return dict(state=state, values=torch.tensor([[float(v) for v in row] for row in learn.recorder.values], dtype=torch.float64))


if __name__ == '__main__':
    torch.set_num_threads(1)
    folder, learner = sys.argv[1:]
    learn = fit(learner)
    write_tensors(Path(folder)/f'{rank_distrib()}.safetensors', ends(learn))
