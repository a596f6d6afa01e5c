"A run that learns from another one: what it leaves, and that it goes on to the bit without its teacher"
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from time import sleep

import pytest
import torch
from processes import Script, bin
from safetensors.torch import load_file

from s9_fastai.cifar.load import load_cifar
from s9_fastai.cifar.loaders import cifar_dls
from s9_fastai.data.loader import hold_out
from s9_fastai.app.teacher import packaged_logits
from s9_fastai.training.distill import TeacherLogits
from s9_fastai.app.learner import s9_learner
from s9_fastai.app.recipe import get_recipe
from s9_fastai.app.command import BadInput
from s9_fastai.app.train import s9_train

pytestmark = pytest.mark.usefixtures('no_pictures_in_module')
options = dict(data='sample', recipe='stated', n_channels=4, distill=0.5, bs=250, policy='flip_crop', augment='batch', epochs=2, seed=3)


@pytest.fixture(scope='module')
def pupil(tmp_path_factory, no_pictures_in_module):
    "A run of two epochs that had a teacher"
    tmp = tmp_path_factory.mktemp('runs')
    s9_train('sample', n_channels=6, bs=250, epochs=1, out=tmp/'teacher')
    s9_train(**options, teacher=tmp/'teacher', out=tmp/'pupil')
    return tmp/'pupil'


def same_weights(a, b):
    a, b = (load_file(o/'weights.safetensors') for o in (a, b))
    return all((a[k] == b[k]).all() for k in a)


def test_it_says_who_taught(pupil):
    teacher_logits = TeacherLogits.load(pupil/'teacher.safetensors')
    assert json.loads((pupil/'recipe.json').read_text())['teacher'] == teacher_logits.key and teacher_logits.logits.shape == (2000, 10)


def test_the_teacher_matters(pupil, tmp_path):
    s9_train(**{**options, 'distill': 0.}, out=tmp_path/'alone')
    assert not same_weights(pupil, tmp_path/'alone')


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no SIGTERM')
def test_stopped_in_an_epoch_it_goes_on_to_the_bit(pupil, tmp_path):
    args = [str(o) for k, v in options.items() for o in (f'--{k.replace("_", "-")}', v)]
    script = Script(bin/'s9_train', *args, '--teacher', pupil.parent/'teacher', '--save-every', 1, '--out', tmp_path/'run')
    while not [*(tmp_path/'run'/'checkpoints').glob('00-00001-train-00000[2-7].safetensors')]:
        assert script.returncode is None
        sleep(0.02)
    os.kill(script.pid, signal.SIGTERM)
    assert script.end().returncode == 128 + signal.SIGTERM and not (tmp_path/'run'/'weights.safetensors').exists()
    s9_train(resume=tmp_path/'run')
    assert same_weights(pupil, tmp_path/'run')


def test_no_other_answers_are_taken(pupil, tmp_path):
    run = Path(shutil.copytree(pupil, tmp_path/'run'))
    TeacherLogits(torch.zeros(2000, 10)).save(run/'teacher.safetensors')
    with pytest.raises(BadInput, match='settings have changed since the run stopped: callback distill was .*teacher_logits='): s9_train(resume=run, epochs=3)
    (run/'teacher.safetensors').write_bytes(b'PK')
    with pytest.raises(BadInput, match='teacher.safetensors: a pickle, which could run code, is refused'): s9_train(resume=run, epochs=3)
    (run/'teacher.safetensors').unlink()
    with pytest.raises(BadInput, match='teacher.safetensors'): s9_train(resume=run, epochs=3)


@pytest.mark.parametrize('shape, said', [((1999, 10), 'has logits for 1999 images, but'), ((2000, 9), 'has 9 classes, but')])
def test_answers_that_do_not_fit_are_refused_before_a_folder_is_made(pupil, tmp_path, shape, said):
    about = TeacherLogits.load(pupil/'teacher.safetensors').about  # of the right data, as somebody could forge it
    TeacherLogits(torch.zeros(shape), **about).save(tmp_path/'forged.safetensors')
    with pytest.raises(BadInput, match=said): s9_train(**options, teacher=tmp_path/'forged.safetensors', out=tmp_path/'run')
    assert not (tmp_path/'run').exists()


@pytest.mark.skipif(not os.environ.get('S9_CIFAR10'), reason='S9_CIFAR10 does not name the full CIFAR-10')
def test_the_teacher_in_the_package_knows_images_that_it_has_not_seen():
    data, dls = load_cifar(os.environ['S9_CIFAR10']), cifar_dls(os.environ['S9_CIFAR10'], device='cpu')
    right = packaged_logits(dls).logits.argmax(1).numpy() == data.train.labels
    assert right[hold_out(data.train.labels, 5000)].sum() == 4662 and right.mean() > 0.98
    learn = s9_learner(dls, get_recipe('fast', distill=0.9))
    assert learn.distill.teacher_logits.key == packaged_logits(dls).key
    with pytest.raises(ValueError, match='the teacher in the package: this teacher was trained with held_out 5000, .* train one with held_out 4000'):
        packaged_logits(cifar_dls(os.environ['S9_CIFAR10'], held_out=4000, device='cpu'))
