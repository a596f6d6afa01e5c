"The methods that are compared: loaders and training of the Net with fastai, PyTorch, torchvision and kornia, and with this package"
from functools import partial
from importlib.util import find_spec
from time import perf_counter

import albumentations as A
import numpy as np
import torch
import torch.nn.functional as F
from albumentations.pytorch import ToTensorV2
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import GrandparentSplitter, Normalize, get_image_files, parent_label
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fasttransform import Transform
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from s9_fastai.augment.policies import get_policy
from s9_fastai.cifar.facts import MEAN, SIZE, STD
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.training.fast import keep_freed_memory, autocast_dtype
from s9_fastai.training.layers import fast_layers
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.nets.net import Net
from s9_fastai.training.schedule import StepLR

# ---- loaders: each takes the source, the batch size and the number of workers, and returns a training and a test loader


class Augment(Transform):
    "Albumentations in a `DataBlock`, as in fastai's documentation"
    split_idx = 0  # training images only

    def __init__(self, aug):
        super().__init__()
        self.aug = aug

    def encodes(self, img:PILImage): return PILImage.create(self.aug(image=np.array(img))['image'])


def fastai_dls(source, bs, workers):
    "PNG files in folders, opened again for each batch, as in fastai's documentation"
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
        splitter=GrandparentSplitter(valid_name='test'), item_tfms=Augment(get_policy('reference', SIZE, MEAN)),
        batch_tfms=Normalize.from_stats(MEAN, STD))
    return block.dataloaders(source.folder, bs=bs, num_workers=workers)


class ArrayDataset(Dataset):
    "All images in memory, each given as a PIL image to `tfm`, as in torchvision's CIFAR-10"
    def __init__(self, split, tfm):
        self.images, self.labels, self.tfm = np.array(split.images), split.labels.tolist(), tfm

    def __len__(self): return len(self.labels)
    def __getitem__(self, i): return self.tfm(Image.fromarray(self.images[i])), self.labels[i]


class ForPIL:
    "An Albumentations pipeline from a PIL image to a normalised tensor"
    def __init__(self, tfms): self.pipe = A.Compose([*tfms, A.Normalize(MEAN, STD), ToTensorV2()])
    def __call__(self, img): return self.pipe(image=np.array(img))['image']


def array_loaders(source, bs, workers, train_tfm, test_tfm):
    "torch's `DataLoader`s over both splits"
    data = load_cifar(source.path)
    return (DataLoader(ArrayDataset(data.train, train_tfm), bs, shuffle=True, num_workers=workers),
            DataLoader(ArrayDataset(data.test, test_tfm), bs, num_workers=workers))


def pytorch_loaders(source, bs, workers):
    "Albumentations for one image at a time in torch's `DataLoader`"
    return array_loaders(source, bs, workers, ForPIL(get_policy('reference', SIZE, MEAN).transforms), ForPIL([]))


def torchvision_loaders(source, bs, workers):
    "torchvision's own transforms that come nearest to the policy, one image at a time; no reflection at borders"
    affine = v2.RandomAffine(15, (0.0625, 0.0625), (0.8, 1.2), interpolation=v2.InterpolationMode.BILINEAR)
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    train = v2.Compose([  # moving a small PIL image is faster than moving a tensor
        v2.RandomApply([affine], p=0.3), v2.RandomHorizontalFlip(), v2.ToImage(),
        v2.RandomErasing(0.5, (0.25, 0.25), (1, 1)),  # a quarter of 32x32 pixels is 16x16
        v2.RandomApply([v2.ColorJitter(0.2, 0.2)], p=0.2), v2.ToPureTensor(), *end])
    return array_loaders(source, bs, workers, train, v2.Compose([v2.ToImage(), v2.ToPureTensor(), *end]))


class BatchLoader:
    "Shuffled batches cut out of one tensor, then `tfm` for the whole batch"
    def __init__(self, split, bs, tfm):
        self.x = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2).contiguous()
        self.y, self.bs, self.tfm = torch.from_numpy(np.array(split.labels)).long(), bs, tfm

    def __iter__(self):
        for i in torch.randperm(len(self.y)).split(self.bs):
            with torch.no_grad(): xb = self.tfm(self.x[i].float().div_(255))
            yield xb, self.y[i]


def kornia_loaders(source, bs, workers):
    "kornia's transforms that come nearest to the policy, on whole batches; a loader for training alone"
    import kornia.augmentation as K
    tfm = K.AugmentationSequential(
        K.RandomAffine(15., (0.0625, 0.0625), (0.8, 1.2), padding_mode='reflection', p=0.3), K.RandomHorizontalFlip(),
        K.RandomErasing((0.25, 0.25), (1., 1.), p=0.5), K.ColorJitter(0.2, 0.2, p=0.2),
        K.Normalize(list(MEAN), list(STD)), data_keys=['input'])
    return BatchLoader(load_cifar(source.path).train, bs, tfm), None


def our_dls(source, bs, workers, augment, seed=None):
    "The loaders of this package; `augment` is 'item' or 'batch'"
    return cifar_dls(source.path, bs=bs, policy='reference', augment=augment, num_workers=workers, seed=seed)


LOADERS = {'fastai': fastai_dls, 'pytorch': pytorch_loaders, 'torchvision': torchvision_loaders,
           'kornia': kornia_loaders, 'item': partial(our_dls, augment='item'),
           'batch': partial(our_dls, augment='batch')}
TITLES = {'fastai': 'fastai idiom', 'pytorch': 'plain PyTorch', 'torchvision': 'torchvision v2 (nearest policy)',
          'kornia': 'kornia (nearest policy)', 'item': 'item path', 'batch': 'batch path'}
IN_ONE_PROCESS = ('kornia',)  # works on whole batches, so it takes no workers


def has_kornia(): return find_spec('kornia') is not None


def loader_name(key, workers):
    "The name of a loader in tables"
    return f'{TITLES[key]}, {"1 process" if workers == 0 else "1 worker" if workers == 1 else f"{workers} workers"}'


def check_batch(xb, yb, bs):
    "AssertionError unless the batch is what every method delivers"
    assert xb.shape == (bs, 3, 32, 32) and xb.dtype == torch.float32 and xb.device.type == 'cpu', (xb.shape, xb.dtype)
    assert yb.shape == (bs,) and yb.dtype == torch.int64 and set(yb.tolist()) <= set(range(10)), yb
    # the black squares of cutout pull the mean below 0
    assert -0.6 < xb.mean() < 0.3 and 0.7 < xb.std() < 1.7, (xb.mean(), xb.std())


def make_pass(key, source, bs, workers):
    "A function that reads all training batches once and returns the images per second"
    train = LOADERS[key](source, bs, workers)[0]

    def run():
        start, n = perf_counter(), 0
        for xb, yb in train:
            if n == 0: check_batch(xb, yb, min(bs, source.n_train))
            n += len(xb)
        return {'loading': n/(perf_counter() - start)}
    return run


# ---- epochs: each `make` returns a function that runs an epoch with its test: seconds of both, and of the training part


class Clock(Callback):
    "Times the training part of an epoch"
    def before_train(self): self.start = perf_counter()
    def after_train(self): self.seconds = perf_counter() - self.start


def fit_once(learn):
    "One epoch of `learn`, without progress bars or printed rows"
    clock, start = Clock(), perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=clock)
    return {'epoch': perf_counter() - start, 'training': clock.seconds}


def make_fastai(source, bs, workers):
    "A `Learner` as in fastai's documentation"
    learn = Learner(fastai_dls(source, bs, workers), Net(), opt_func=partial(SGD, mom=0.9), lr=0.05, metrics=accuracy,
                    cbs=StepLR())
    return partial(fit_once, learn)


def make_ours(source, bs, workers, compute, augment):
    "The Learner of this package; `compute` is 'plain' or 'fast', `augment` 'item' or 'batch'"
    recipe = get_recipe('stated', compute=compute, augment=augment, bs=bs)
    return partial(fit_once, s9_learner(our_dls(source, bs, workers, augment), recipe))


def make_recipe(source, bs, workers, name):
    "The Learner of this package with the recipe called `name`, as `s9_train` makes it"
    recipe = get_recipe(name, bs=bs)
    dls = cifar_dls(source.path, bs=bs, policy=recipe.policy, augment=recipe.augment, num_workers=workers)
    return partial(fit_once, s9_learner(dls, recipe))


def train_pytorch(model, opt, loader):
    "The training loop of a PyTorch tutorial: mean loss and accuracy"
    model.train()
    loss_sum, correct, n = 0., 0, 0
    for xb, yb in loader:
        opt.zero_grad()
        out = model(xb)
        loss = F.cross_entropy(out, yb)
        loss.backward()
        opt.step()
        loss_sum += loss.item()*len(yb)
        correct += (out.argmax(1) == yb).sum().item()
        n += len(yb)
    return loss_sum/n, correct/n


@torch.no_grad()
def test_pytorch(model, loader):
    "The test loop of a PyTorch tutorial: mean loss and accuracy"
    model.eval()
    loss_sum, correct, n = 0., 0, 0
    for xb, yb in loader:
        out = model(xb)
        loss_sum += F.cross_entropy(out, yb, reduction='sum').item()
        correct += (out.argmax(1) == yb).sum().item()
        n += len(yb)
    return loss_sum/n, correct/n


def make_pytorch(source, bs, workers):
    "A loop as in PyTorch's tutorials"
    train, test = pytorch_loaders(source, bs, workers)
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def run():
        start = perf_counter()
        train_pytorch(model, opt, train)
        trained = perf_counter()
        test_pytorch(model, test)
        return {'epoch': perf_counter() - start, 'training': trained - start}
    return run


def fast_net(dropout):
    "The Net with the fast layers of this package, channels last"
    return fast_layers(Net(dropout=dropout)).to(memory_format=torch.channels_last)


def fixed_batch(bs, memory_format=torch.channels_last):
    "A batch that is already there"
    gen = torch.Generator().manual_seed(0)
    return (torch.randn(bs, 3, 32, 32, generator=gen).contiguous(memory_format=memory_format),
            torch.randint(10, (bs,), generator=gen))


def bare_epoch(model, opt, xb, yb, steps, dtype):
    "`steps` training steps on one batch, the model in `dtype`: forward, loss, backward, optimizer, and nothing else"
    for _ in range(steps):
        with torch.autocast(xb.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16): out = model(xb)
        F.cross_entropy(out.float(), yb).backward()
        opt.step()
        opt.zero_grad()


def bare_sgd(model): return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)


def make_bare(source, bs, workers):
    "The limit of the training part: the fast network in its dtype, with a batch that is already there"
    keep_freed_memory()
    model, dtype = fast_net(get_recipe('stated').dropout).train(), autocast_dtype(torch.device('cpu'))
    opt, (xb, yb) = bare_sgd(model), fixed_batch(bs)
    steps = -(-source.n_train//bs)  # the last batch of an epoch is partial

    def run():
        start = perf_counter()
        bare_epoch(model, opt, xb, yb, steps, dtype)
        return {'training': perf_counter() - start}
    return run


OURS = {f'{augment}-{compute}': (f'{augment} path, {compute} compute',
                                 partial(make_ours, compute=compute, augment=augment), 0)
        for compute in ('fast', 'plain') for augment in ('batch', 'item')}
RECIPE = {f'recipe-{nm}': (f'recipe {nm}', partial(make_recipe, name=nm), 0) for nm in ('logged', 'fast', 'best')}
# name: title, how it is made, workers
EPOCHS = {'fastai': ('fastai idiom, 1 process', make_fastai, 0),
          'fastai-2': ('fastai idiom, 2 workers', make_fastai, 2),
          'pytorch-2': ('plain PyTorch, 2 workers', make_pytorch, 2), **OURS,
          'bare': ('bare network, batch already there', make_bare, 0)}
