"""Accuracy of the packaged weights on the test images: of all, by class, and with corruptions made on the fly.

The corruptions are those of CIFAR-10-C (Hendrycks and Dietterich, 2019, five severities each) that a few lines can make;
their strengths are those of its published code. The images are not its files, so compare with CIFAR-10-C with care.
"""
import sys
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data_option, facts, options, parse, save
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.facts import CLASSES, MEAN, STD
from s9_fastai.nets.tta import FlipTTA
from s9_fastai.nets.net import WEIGHTS, Net


def noise(x, std, rng): return x + rng.normal(0, 255*std, x.shape)  # Gaussian, for each value by itself
def blur(x, sigma, rng): return np.stack([cv2.GaussianBlur(o, (0, 0), sigma) for o in x])  # sigma in pixels
def contrast(x, factor, rng): return (x - x.mean((1, 2), keepdims=True))*factor + x.mean((1, 2), keepdims=True)


def jpeg(x, quality, rng):
    def coded(o):
        with BytesIO() as f:
            Image.fromarray(o).save(f, 'JPEG', quality=quality)
            return np.asarray(Image.open(f).convert('RGB'))
    return np.stack([*map(coded, x.astype(np.uint8))])


corruptions = {
    'Gaussian noise': (noise, [0.04, 0.06, 0.08, 0.09, 0.10]), 'Gaussian blur': (blur, [0.4, 0.6, 0.7, 0.8, 1.0]),
    'contrast': (contrast, [0.75, 0.5, 0.4, 0.3, 0.15]), 'JPEG': (jpeg, [80, 65, 58, 50, 40])}


@torch.inference_mode()
def recognised(net, images, labels):
    "For each of the uint8 images (N, 32, 32, 3), whether `net` recognises it; in float32"
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in (MEAN, STD))
    batches = torch.tensor(images).permute(0, 3, 1, 2).split(500)  # (500, 3, 32, 32)
    found = torch.cat([net((o.float()/255 - mean)/std).argmax(1) for o in batches])
    return found.numpy() == labels


def corrupted(images, f, strength, seed):
    out = f(images.astype(np.float32), strength, np.random.default_rng(seed))
    return np.clip(np.round(out), 0, 255).astype(np.uint8)


def measure(net, test):
    "Counts of recognised images: of all, with flip TTA too, by class, by corruption and severity"
    hit = recognised(net, test.images, test.labels)
    mirrored = int(recognised(FlipTTA(net), test.images, test.labels).sum())
    by_class = {c: int(hit[test.labels == i].sum()) for i, c in enumerate(CLASSES)}
    harder = {nm: [int(recognised(net, corrupted(test.images, f, s, i), test.labels).sum())
                   for i, s in enumerate(strengths)] for nm, (f, strengths) in corruptions.items()}
    return dict(n_test=len(hit), correct=int(hit.sum()), mirrored=mirrored, by_class=by_class, corruptions=harder,
                strengths={nm: s for nm, (_, s) in corruptions.items()})


def main():
    p = options(__doc__)
    data_option(p)
    args = parse(p)
    o = measure(Net.pretrained(), load_cifar(args.data).test)
    save([dict(what=WEIGHTS.name, measure='recognised test images', **o, **facts())], args.out)
    print(f'{o["correct"]} of {o["n_test"]}', o['by_class'], o['corruptions'], sep='\n')


if __name__ == '__main__': main()
