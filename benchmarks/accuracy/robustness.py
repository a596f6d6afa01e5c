"""Accuracy of the packaged weights on the test images: of all, by class, and with corruptions made on the fly.

The corruptions are those of `s9_fastai.augment.corruptions`, which are like those of CIFAR-10-C (Hendrycks and Dietterich,
2019). The images are not its files, so compare with CIFAR-10-C with care.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data_option, facts, options, parse, save
from s9_fastai.augment.corruptions import CORRUPTIONS
from s9_fastai.cifar.facts import CLASSES, MEAN, STD
from s9_fastai.cifar.load import load_cifar
from s9_fastai.core.spec import ImageSpec
from s9_fastai.nets.net import WEIGHTS, Net
from s9_fastai.nets.tta import FlipTTA
from s9_fastai.report.robustness import robustness


@torch.inference_mode()
def recognised(net, images, labels):
    "For each of the uint8 images (N, 32, 32, 3), whether `net` recognises it; in float32"
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in (MEAN, STD))
    batches = torch.tensor(images).permute(0, 3, 1, 2).split(500)  # (500, 3, 32, 32)
    found = torch.cat([net((o.float()/255 - mean)/std).argmax(1) for o in batches])
    return found.numpy() == labels


def measure(net, test):
    "Counts of recognised images: of all, with flip TTA too, by class, by corruption and severity"
    hit = recognised(net, test.images, test.labels)
    mirrored = int(recognised(FlipTTA(net), test.images, test.labels).sum())
    by_class = {c: int(hit[test.labels == i].sum()) for i, c in enumerate(CLASSES)}
    spec = ImageSpec(CLASSES, 32, MEAN, STD)
    with torch.inference_mode(): scores = robustness(lambda x: net(spec.batch(x)), CORRUPTIONS, tuple(test)).scores
    harder = {nm: scores.right[scores.corruption == nm].tolist() for nm in CORRUPTIONS}
    return dict(n_test=len(hit), correct=int(hit.sum()), mirrored=mirrored, by_class=by_class, corruptions=harder,
                strengths={nm: f.strengths for nm, f in CORRUPTIONS.items()})


def main():
    p = options(__doc__)
    data_option(p)
    args = parse(p)
    o = measure(Net.pretrained(), load_cifar(args.data).test)
    save([dict(what=WEIGHTS.name, measure='recognised test images', **o, **facts())], args.out)
    print(f'{o["correct"]} of {o["n_test"]}', o['by_class'], o['corruptions'], sep='\n')


if __name__ == '__main__': main()
