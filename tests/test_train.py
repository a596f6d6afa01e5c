"The commands, as a user runs them: what they leave, what they print, and what they say when something is wrong"
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from s9_fastai.learner import RECIPES, Recipe
from s9_fastai.net import Net
from s9_fastai.train import BadInput, main_train, s9_train

bin = Path(sys.executable).parent


def command(*args, cwd=None):
    return subprocess.run([bin/args[0], *map(str, args[1:])], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "One epoch on the sample, in a pipe"
    cwd = tmp_path_factory.mktemp('cwd')
    done = command('s9_train', '--data', 'sample', '--epochs', 1, '--bs', 250, '--norm', 'ln', '--seed', 7, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, next((cwd/'runs').iterdir())


def test_run_folder_is_complete(run):
    names = ['checkpoints', 'curves.png', 'history.csv', 'log.txt', 'misclassified.png', 'recipe.json', 'weights.safetensors']
    assert sorted(p.name for p in run[1].iterdir()) == names


def test_recipe_is_resolved(run):
    told = json.loads((run[1]/'recipe.json').read_text())
    want = {**asdict(RECIPES['sample']), 'epochs': 1, 'bs': 250, 'norm': 'ln', 'seed': 7, 'name': 'sample', 'data': 'sample', 'workers': 0}
    assert {k: told[k] for k in want} == want
    assert {'torch', 'fastai', 'albumentations', 'data_key', 'device', 'python'} <= set(told)


def test_weights_fit_the_net(run):
    Net(norm='ln').load_state_dict(load_file(run[1]/'weights.safetensors'))


def test_pictures_open(run):
    for nm in ('curves.png', 'misclassified.png'): assert np.asarray(Image.open(run[1]/nm)).std() > 5


def test_a_pipe_gets_whole_lines(run):
    out = run[0].stdout
    assert out.count('\n') == 2 and '\r' not in out and '█' not in out and out.startswith('epoch   1  train_loss ')
    assert f'{100*pd.read_csv(run[1]/"history.csv").valid_accuracy[0]:.2f}%' in out


def test_nothing_else_is_printed(run): assert run[0].stderr == ''


def test_the_same_seed_gives_the_same_run(run, tmp_path):
    again = command('s9_train', '--data', 'sample', '--epochs', 1, '--bs', 250, '--norm', 'ln', '--seed', 7, '--workers', 2, '--out', tmp_path/'b')
    assert again.returncode == 0, again.stderr
    a, b = load_file(run[1]/'weights.safetensors'), load_file(tmp_path/'b'/'weights.safetensors')
    assert all((a[k] == b[k]).all() for k in a)
    assert (tmp_path/'b'/'log.txt').read_text() == (run[1]/'log.txt').read_text()


def test_whole_batches_and_plain_layers(tmp_path):
    "The other way of each switch; with and without workers the same weights"
    for w in (0, 2):
        done = command('s9_train', '--data', 'sample', '--epochs', 1, '--bs', 250, '--augment', 'batch', '--compute', 'plain', '--workers', w, '--out', tmp_path/str(w))
        assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path/w/'weights.safetensors') for w in '02')
    assert all((a[k] == b[k]).all() for k in a)
    told = json.loads((tmp_path/'0'/'recipe.json').read_text())
    assert (told['augment'], told['compute'], told['number_format']) == ('batch', 'plain', 'float32')


def test_every_field_of_the_recipe_is_an_option():
    text = command('s9_train', '--help').stdout
    for f in fields(Recipe): assert f'--{f.name.replace("_", "-")} ' in text
    for o in ('--data', '--recipe', '--seed', '--workers', '--device', '--out'): assert o in text


bad = [('--recipe fastest', "'fastest', but must be one of stated, logged, sample"), ('--epochs 0', 'epochs is 0, but must be at least 1'),
       ('--epochs three', "invalid int value: 'three'"), ('--lr -1', 'lr is -1.0'), ('--lr nan', 'lr is nan'), ('--dropout 1', 'dropout is 1.0'),
       ('--norm xx', "norm is 'xx'"), ('--policy xx', "policy is 'xx'"), ('--augment xx', "augment is 'xx', but must be 'item' or 'batch'"),
       ('--compute xx', "compute is 'xx', but must be 'fast' or 'plain'"), ('--n-channels 37', 'n_channels is 37'), ('--sched xx', "'xx'"),
       ('--seed -1', 'seed is -1'), ('--workers -1', 'num_workers is -1'), ('--device abacus', "device is 'abacus'"), ('--bs 0', 'bs is 0'),
       ('--data nowhere', 'nowhere: no such file or folder'), ('--foo', 'unrecognized arguments: --foo'), ('--out FILE', 'which is a file: name a folder'),
       ('--out FILE/run', 'cannot be written'), ('--out FULL', 'not empty: name another one'), ('--out /proc/run', 'cannot be written')]


@pytest.mark.parametrize('args, msg', bad, ids=[a for a, _ in bad])
def test_bad_input_is_one_line_and_exit_code_2(args, msg, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'FILE').write_text('x')
    (tmp_path/'FULL').mkdir()
    (tmp_path/'FULL'/'log.txt').write_text('precious')
    data = [] if '--data' in args else ['--data', 'sample']
    monkeypatch.setattr(sys, 'argv', ['s9_train', *data, *args.split()])
    with pytest.raises(SystemExit) as e: main_train()
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ''
    assert msg in err and err.count('\n') == 1 and err.startswith('s9_train: ')
    assert (tmp_path/'FULL'/'log.txt').read_text() == 'precious' and not (tmp_path/'runs').exists()


def test_summary_prints_the_table():
    done = command('s9_summary')
    assert done.returncode == 0 and '99,912' in done.stdout and done.stderr == ''
    assert command('s9_summary', '--norm', 'xx').returncode == 2


def test_from_python_bad_input_is_an_exception(tmp_path):
    with pytest.raises(BadInput, match='epochs is 0'): s9_train('sample', epochs=0, out=tmp_path/'run')
    with pytest.raises(BadInput, match="no field 'speed'"): s9_train('sample', speed=3, out=tmp_path/'run')
    assert not (tmp_path/'run').exists()


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no pseudo-terminals')
def test_a_terminal_gets_bars(tmp_path):
    master, slave = os.openpty()
    p = subprocess.Popen([bin/'s9_train', '--data', 'sample', '--epochs', '1', '--bs', '500', '--out', tmp_path/'run'], stdout=slave, stderr=slave)
    os.close(slave)
    seen = b''
    try:
        while data := os.read(master, 4096): seen += data
    except OSError: pass  # how Linux tells that the other end is closed
    text = seen.decode(errors='replace')
    assert p.wait() == 0 and 'Epoch 1/1' in text and '█' in text and 'train_accuracy' in text
