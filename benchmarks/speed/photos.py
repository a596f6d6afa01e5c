"""Images per second of training loaders over photos, by image size: fastai's documented way, which decodes each JPEG file in each epoch, against
`image_dls`, which decodes it once. The photos are made up: noise with the spectrum of natural images and shapes with sharp borders. Measured are later
epochs of loading, the first one, in which `image_dls` builds its cache, epochs in which a resnet18 is trained from scratch, or the augmentation alone"""
import shutil
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import Normalize, RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.vision.augment import Resize
from fastai.vision.core import TensorImage, imagenet_stats
from fastai.vision.data import ImageBlock
from PIL import Image, ImageDraw
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import options, parse, save, show
from methods import Augment
from rounds import Method, interleave, lines_of
from s9_fastai.augment.batch import BatchAugment
from s9_fastai.augment.policies import get_policy
from s9_fastai.data.cache import cache_folder, fastai_dir
from s9_fastai.data.images import square_pixels
from s9_fastai.data.loaders import image_dls

CLASSES = 10


def photo(rng, size):
    "An image of 1/f noise with some shapes on it"
    freq = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    spectrum = rng.normal(size=(3, *freq.shape, 2)) @ [1, 1j]/np.maximum(freq, 1/size)
    x = np.fft.irfft2(spectrum, (size, size)).transpose(1, 2, 0)
    im = Image.fromarray(np.uint8(np.clip(128 + 50*(x - x.mean())/x.std(), 0, 255)))
    draw = ImageDraw.Draw(im)
    for shape in (draw.ellipse, draw.rectangle):
        corner, span = rng.integers(0, size//2, 2), rng.integers(size//8, size//2, 2)
        shape([*map(int, corner), *map(int, corner + span)], fill=tuple(map(int, rng.integers(0, 256, 3))))
    return im


def write_photos(n, size):
    "A folder of `n` JPEG files of `size` pixels in ten classes, written once"
    folder = fastai_dir('data')/'s9_benchmarks'/f'photos-{n}-{size}'
    if folder.exists(): return folder
    print(f'writing {n:,} photos to {folder}', file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with TemporaryDirectory(dir=folder.parent) as tmp:  # renamed when it is complete
        for c in range(CLASSES): (Path(tmp)/'new'/str(c)).mkdir(parents=True)
        for i in range(n): photo(rng, size).save(Path(tmp)/'new'/str(i % CLASSES)/f'{i}.jpg', quality=90)
        (Path(tmp)/'new').rename(folder)
    return folder


def fastai_loader(folder, size, policy, bs, workers):
    "JPEG files opened again for each batch, with Albumentations as in fastai's documentation"
    tfms = [Resize(size), Augment(get_policy(policy, size, (0.5, 0.5, 0.5)))]
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(0.2, seed=0),
                      item_tfms=tfms, batch_tfms=Normalize.from_stats(*imagenet_stats))
    return block.dataloaders(folder, bs=bs, num_workers=workers, device='cpu')


def our_loader(folder, size, policy, bs, workers, augment):
    return image_dls(folder, bs=bs, size=size, policy=policy, augment=augment, num_workers=workers, device='cpu', progress=False)


LOADERS = {'fastai': fastai_loader, 'item': partial(our_loader, augment='item'), 'batch': partial(our_loader, augment='batch')}
TITLES = {'fastai': 'fastai idiom', 'item': 'image_dls, item path', 'batch': 'image_dls, batch path'}


def epoch_of(dls):
    "Images per second of a pass over the training images"
    n, begun = 0, perf_counter()
    for x, _ in dls.train: n += len(x)
    return n/(perf_counter() - begun)


def make_epochs(key, **kwargs):
    dls = LOADERS[key](**kwargs)
    return lambda: dict(loading=epoch_of(dls))


def make_first(key, folder, **kwargs):
    "The first epoch: loaders are made, and the cache is built if there is one"
    def run():
        for old in cache_folder().glob('images-*') if key != 'fastai' else (): shutil.rmtree(old)
        begun = perf_counter()
        for _ in LOADERS[key](folder, **kwargs).train: pass
        return dict(first=perf_counter() - begun)
    return run


def make_training(key, **kwargs):
    "An epoch of a resnet18 with validation: plain with fastai's loader, `to_fast` with ours, which needs no workers"
    if key != 'fastai': kwargs['workers'] = 0
    learn = Learner(LOADERS[key](**kwargs), resnet18(num_classes=CLASSES), CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy)
    if key != 'fastai': learn.to_fast()
    def run():
        begun = perf_counter()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
        return dict(training=perf_counter() - begun)
    return run


def make_policy(key, folder, size, policy, bs, workers):
    "Microseconds an image for the augmentation of a batch, in memory"
    files = [f for _, f in zip(range(bs), sorted(folder.rglob('*.jpg')))]
    images = np.stack([square_pixels(f, size) for f in files])
    compose = get_policy(policy, size, (0.5, 0.5, 0.5))
    whole, batch, rng = BatchAugment.from_compose(compose), TensorImage(torch.from_numpy(images).permute(0, 3, 1, 2)), np.random.default_rng(0)
    def on_batch():
        batch.keys = rng.integers(0, 2**62, bs).astype(np.uint64)
        return whole(batch, split_idx=0)
    def on_items(): return np.stack([compose(image=o)['image'] for o in images])
    def run():
        begun = perf_counter()
        for _ in range(20): on_batch() if key == 'batch' else on_items()
        return dict(policy=(perf_counter() - begun)/(20*bs)*1e6)
    return run


#: What makes a repetition, its unit, and the loaders that are compared; of whole trainings only the faster of ours
MEASURES = {'loading': (make_epochs, 'images/s', ('fastai', 'item', 'batch')), 'first': (make_first, 's', ('fastai', 'item', 'batch')),
            'training': (make_training, 's', ('fastai', 'batch')), 'policy': (make_policy, 'us an image', ('item', 'batch'))}


def measure(args, size):
    "Interleaved rounds of the loaders at one size"
    make, unit, keys = MEASURES[args.measure]
    folder, group = write_photos(args.images, max(args.photo, size)), []
    for key in keys:
        kwargs = dict(key=key, folder=folder, size=size, policy=args.policy, bs=args.bs, workers=args.workers)
        settings = {k: v for k, v in kwargs.items() if k not in ('key', 'folder')} | dict(images=args.images, photo=max(args.photo, size))
        group.append(Method(TITLES[key], make, kwargs, settings, args.threads))
    interleave(group, args.repeats)
    lines = lines_of(group, {args.measure: unit})
    save(lines, args.out)
    print(f'\n{args.images:,} photos of {max(args.photo, size)} pixels at {size} pixels')
    show(lines, TITLES[keys[0]])


def main():
    p = options(__doc__, repeats=3)
    p.add_argument('--images', type=int, default=10_000, help='photos')
    p.add_argument('--photo', type=int, default=128, help='height and width of the photos, at least the size of the images')
    p.add_argument('--sizes', type=int, nargs='+', default=[32, 64, 128, 224], metavar='N', help='height and width of the images')
    p.add_argument('--policy', default='reference', help='augmentation')
    p.add_argument('--bs', type=int, default=64, help='images a batch')
    p.add_argument('--workers', type=int, default=0, help='processes that make batches')
    p.add_argument('--measure', choices=[*MEASURES], default='loading', help='what is measured')
    args = parse(p)
    for size in args.sizes: measure(args, size)


if __name__ == '__main__': main()
