"The weights that come with the package: what they recognise, what is said of them, and the command that uses them"
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from PIL import Image
from processes import run

from s9_fastai.cifar.facts import CLASSES
from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.nets.tta import FlipTTA
from s9_fastai.nets.net import WEIGHTS, Net
from s9_fastai.app.predict import main_predict

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'benchmarks'/'accuracy'))
from robustness import recognised

lines = [json.loads(o) for o in (root/'benchmarks'/'results'/'robustness.jsonl').read_text(encoding='utf-8').splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('S9_CIFAR10'), reason='S9_CIFAR10 does not name the full CIFAR-10')
def test_the_exact_count_of_the_test_images():
    "The figure of the model card, counted anew"
    test = load_cifar(os.environ['S9_CIFAR10']).test
    net = Net.pretrained()
    assert recognised(net, test.images, test.labels).sum() == lines[-1]['correct'] > 8543
    assert recognised(FlipTTA(net), test.images, test.labels).sum() == lines[-1]['mirrored'] > lines[-1]['correct']


def test_the_card_is_what_the_results_say():
    done = run(root/'tools'/'weights.py', '--check')
    assert done.returncode == 0, done.stderr
    text = (WEIGHTS.parent/'model_card.md').read_text(encoding='utf-8')
    assert f'{lines[-1]["correct"]} of the 10,000 test images' in text and all(c in text for c in CLASSES)


def test_it_is_small_and_float32():
    assert WEIGHTS.stat().st_size < 450_000
    net = Net.pretrained()
    assert not net.training and {p.dtype for p in net.parameters()} == {torch.float32} and sum(p.numel() for p in net.parameters()) == 99_912


def test_a_learner_begins_with_them():
    dls = cifar_dls('sample', device='cpu')
    set_seed(0)
    learn = s9_learner(dls, get_recipe(compute='plain'), pretrained=True)
    for a, b in zip(learn.model.parameters(), Net.pretrained().parameters()): assert a.equal(b)
    with learn.no_bar(): assert learn.validate()[1] > 0.75  # 500 images of the test set


@pytest.mark.parametrize('kw, msg', [(dict(n_channels=8), "8 and 'bn'"), (dict(norm='gn'), "38 and 'gn'")])
def test_another_architecture_is_refused(kw, msg):
    with pytest.raises(ValueError, match=f"are of n_channels=38 and norm='bn', but the recipe has {msg}: leave these or pretrained out"):
        s9_learner(cifar_dls('sample', device='cpu'), get_recipe(**kw), pretrained=True)


@pytest.fixture
def photos(tmp_path):
    "One test image a class, as a user might have it: of any size and kind of file"
    test = load_cifar('sample').test
    files = []
    for i, c in enumerate(CLASSES):
        im = Image.fromarray(test.images[np.argmax(test.labels == i)])
        files.append(tmp_path/f'{c}.{"jpg" if i % 2 else "png"}')
        (im if i else im.convert('RGBA')).resize((64, 64) if i % 3 else (32, 32)).save(files[-1])
    return files


def predict(*args): return subprocess.run([Path(sys.executable).with_name('s9_predict'), *map(str, args)], capture_output=True, text=True)


def test_the_command(photos):
    done = predict(*photos, '--top', 2)
    assert done.returncode == 0 and done.stderr == ''
    rows = done.stdout.splitlines()
    assert [r.split(':')[0] for r in rows] == [str(f) for f in photos] and all(r.count('%') == 2 for r in rows)
    assert sum(f.stem in r.split(':')[1].split(',')[0] for f, r in zip(photos, rows)) >= 6


@pytest.mark.parametrize('args, msg', [([], 'no image: name one or more files'), (['nowhere.png'], 'nowhere.png: no such file'), (['EMPTY'], 'a folder without an image file'),
                                       ([root/'README.md'], 'cannot be read as an image'), (['PHOTO', '--top', 0], 'top is 0, but must be at least 1'),
                                       (['PHOTO', '--top', 'x'], "'x' is not a whole number"), (['PHOTO', '--foo'], 'unrecognized arguments: --foo')])
def test_bad_input_is_one_line_and_exit_code_2(args, msg, photos, monkeypatch, capsys):
    (photos[0].parent/'empty').mkdir()
    places = dict(PHOTO=photos[0], EMPTY=photos[0].parent/'empty')
    monkeypatch.setattr(sys, 'argv', ['s9_predict', *(str(places.get(o, o)) for o in args)])
    with pytest.raises(SystemExit) as e: main_predict()
    out, err = capsys.readouterr()
    assert e.value.code == 2 and msg in err and err.count('\n') == 1 and err.startswith('s9_predict: ') and out == ''
