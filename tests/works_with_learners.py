"Small Learners of many kinds, of made-up data, as a user of fastai builds them: who the parts of the package must work with"
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock
from fastai.data.transforms import IndexSplitter, Normalize, range_of
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from fastai.metrics import accuracy, accuracy_multi
from fastai.optimizer import SGD
from fastai.tabular.all import Categorify, FillMissing, TabularPandas, tabular_learner
from fastai.tabular.core import Normalize as NormalizeColumns
from fastai.text.all import AWD_LSTM, TextBlock, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner
from fastai.torch_core import set_seed
from fastai.vision.all import ConvLayer, ImageBlock, MaskBlock, PILImage, PointBlock, imagenet_stats, unet_learner, vision_learner
from fastcore.foundation import L
from torch import nn
from torchvision.models import resnet18

from s9_fastai.cifar.facts import Cifar10, Split
from s9_fastai.augment.keyed import KeyedDL
from s9_fastai.cifar.loaders import cifar_block
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.test_utils import synth_images

n_train, n_valid, bs = 32, 12, 16
classes = [f'class {i}' for i in range(10)]
words = [f'word{i}' for i in range(40)]


@cache
def images(): return synth_images(n_train + n_valid)


# what is in item `i`
def image(i): return PILImage.create(images()[0][i])
def other(i): return next(j for j in range(i + 1, i + 99) if (images()[1][j % n_train] == images()[1][i]) == (i % 2 == 0)) % n_train
def other_image(i): return image(other(i))
def label(i): return classes[images()[1][i]]
def labels(i): return [classes[images()[1][i]], classes[(i + 3) % 10]]
def is_same(i): return str(i % 2 == 0)
def mask(i): return (images()[0][i][..., 0] > 128).astype(np.uint8)  # follows from the image, so a test can see whether it still fits
def points(i): return torch.tensor([[8. + i % 16, 8.], [16., 24. - i % 8]])
def sentence(i): return ' '.join(words[(i*7 + j*j) % 40] for j in range(5 + i % 9))
def even_sentence(i): return ' '.join(words[(i*7 + j*j) % 40] for j in range(9))
def split_words(s): return L(s.split())


def block_dls(blocks, *getters, item=None, batch=None, keyed=False, workers=0, bs=bs, norm=True, **kwargs):
    "Loaders of `blocks`, with the transforms `item` and `batch`"
    *get_x, get_y = getters
    block = DataBlock(blocks=blocks, getters=[*get_x, get_y], n_inp=len(get_x) or 1, splitter=IndexSplitter(range(n_train, n_train + n_valid)),
                      item_tfms=item, batch_tfms=[*L(batch), *([Normalize.from_stats(*imagenet_stats)] if norm else [])],
                      dl_type=KeyedDL if keyed else None)
    return block.dataloaders(range(n_train + n_valid), bs=bs, num_workers=workers, device='cpu', **kwargs, **(dict(seed=3) if keyed else {}))


image_dls = partial(block_dls, (ImageBlock, CategoryBlock(vocab=classes)), image, label)


def small_cnn(n_out, n_in=3):
    return nn.Sequential(ConvLayer(n_in, 16), ConvLayer(16, 16, stride=2), ConvLayer(16, 24, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.1), nn.Linear(24, n_out))


def narrow_resnet18(pretrained=False):
    "torchvision's resnet18, whose activations are in place, in a quarter of its width"
    net = resnet18(weights=None)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.__init__(3 if m.in_channels == 3 else m.in_channels//4, m.out_channels//4, m.kernel_size, m.stride, m.padding, bias=False)
        if isinstance(m, nn.BatchNorm2d): m.__init__(m.num_features//4)
    return net


class Siamese(nn.Module):
    "Are two images of one class? One encoder for both, and a head"
    def __init__(self):
        super().__init__()
        self.encoder = small_cnn(8)
        self.head = nn.Linear(16, 2)

    def forward(self, a, b): return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))


def net(item=None, batch=None, keyed=True, workers=0, bs=bs, **kwargs):
    data = Cifar10(Split(*(o[:n_train] for o in images())), Split(*(o[n_train:] for o in images())), 'sample', 'made up')
    block = cifar_block(data, 'none')
    if item: block.item_tfms = L(block.item_tfms) + L(item)
    if batch: block.batch_tfms = L(batch) + L(block.batch_tfms)
    dls = block.dataloaders(range(n_train + n_valid), bs=bs, seed=3, num_workers=workers, device='cpu', drop_last=False)
    return s9_learner(dls, get_recipe(n_channels=8, compute='plain'), **kwargs)


def of_images(model_of, item=None, batch=None, keyed=False, workers=0, bs=bs, **kwargs):
    return model_of(image_dls(item=item, batch=batch, keyed=keyed, workers=workers, bs=bs), metrics=accuracy, **kwargs)


def resnet(dls, **kwargs): return vision_learner(dls, narrow_resnet18, pretrained=False, **kwargs)
def convnext(dls, **kwargs): return vision_learner(dls, 'convnext_atto', pretrained=False, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), **kwargs)


def vit(dls, **kwargs):
    import timm
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    return Learner(dls, model, **kwargs)


def unet(item=None, batch=None, keyed=False, workers=0, bs=bs, norm=True, **kwargs):
    blocks = ImageBlock, MaskBlock(codes=['dark', 'light'])
    dls = block_dls(blocks, image, mask, item=item, batch=batch, keyed=keyed, workers=workers, bs=bs, norm=norm)
    return unet_learner(dls, narrow_resnet18, n_out=2, pretrained=False, self_attention=True, **kwargs)


def multi_label(item=None, batch=None, keyed=False, workers=0, bs=bs, **kwargs):
    dls = block_dls((ImageBlock, MultiCategoryBlock(vocab=classes)), image, labels, item=item, batch=batch, keyed=keyed, workers=workers, bs=bs)
    return Learner(dls, small_cnn(10), loss_func=BCEWithLogitsLossFlat(), metrics=accuracy_multi, **kwargs)


def point(item=None, batch=None, keyed=False, workers=0, bs=bs, **kwargs):
    dls = block_dls((ImageBlock, PointBlock), image, points, item=item, batch=batch, keyed=keyed, workers=workers, bs=bs)
    return Learner(dls, small_cnn(4), loss_func=MSELossFlat(), **kwargs)


def siamese(item=None, batch=None, keyed=False, workers=0, bs=bs, **kwargs):
    blocks = ImageBlock, ImageBlock, CategoryBlock(vocab=['False', 'True'])
    dls = block_dls(blocks, image, other_image, is_same, item=item, batch=batch, keyed=keyed, workers=workers, bs=bs)
    return Learner(dls, Siamese(), metrics=accuracy, **kwargs)


def tabular(bs=bs, **kwargs):
    rng = np.random.default_rng(0)
    n = n_train + n_valid
    df = pd.DataFrame(dict(colour=rng.choice(['red', 'blue'], n), size=rng.normal(size=n), age=rng.normal(size=n), y=[classes[i % 3] for i in range(n)]))
    to = TabularPandas(df, [Categorify, FillMissing, NormalizeColumns], ['colour'], ['size', 'age'], 'y', y_block=CategoryBlock(),
                       splits=IndexSplitter(range(n_train, n))(range_of(df)))
    return tabular_learner(to.dataloaders(bs=bs, device='cpu'), layers=[16, 8], metrics=accuracy, **kwargs)


_size = dict(emb_sz=12, n_hid=16, n_layers=2)


def text_classifier(bs=bs, text=sentence, **kwargs):
    dls = block_dls((TextBlock(split_words, vocab=words, seq_len=8), CategoryBlock(vocab=classes)), text, label, norm=False, bs=bs)
    return text_classifier_learner(dls, AWD_LSTM, seq_len=8, config={**awd_lstm_clas_config, **_size}, pretrained=False, metrics=accuracy, **kwargs)


def language_model(bs=4, **kwargs):
    block = DataBlock(blocks=TextBlock(split_words, vocab=words, is_lm=True, seq_len=8), get_x=sentence,
                      splitter=IndexSplitter(range(n_train, n_train + n_valid)))
    dls = block.dataloaders(range(n_train + n_valid), bs=bs, seq_len=8, device='cpu')
    return language_model_learner(dls, AWD_LSTM, config={**awd_lstm_lm_config, **_size}, pretrained=False, metrics=accuracy, **kwargs)


#: By the name that the page gives it
LEARNERS = {
    'Net': net, 'resnet18': partial(of_images, resnet), 'ConvNeXt (timm)': partial(of_images, convnext), 'ViT (timm)': partial(of_images, vit),
    'U-net': unet, 'multi-label': multi_label, 'points': point, 'siamese': siamese, 'tabular': tabular, 'text classifier': text_classifier,
    'language model': language_model}


def make(name, **kwargs):
    "A new Learner of that kind on the CPU: the same weights and loaders each time"
    set_seed(0, reproducible=False)
    return LEARNERS[name](**{'opt_func': partial(SGD, mom=0.9), 'lr': 0.01, **kwargs})
