"The commands, as a user runs them: what they leave, what they print, and what they say when something is wrong"
import json
import os
import shutil
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
from s9_fastai.state import read_tensors
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
        done = command('s9_train', '--data', 'sample', '--recipe', 'stated', '--epochs', 1, '--bs', 250, '--augment', 'batch', '--compute', 'plain', '--workers', w, '--out', tmp_path/str(w))
        assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path/w/'weights.safetensors') for w in '02')
    assert all((a[k] == b[k]).all() for k in a)
    told = json.loads((tmp_path/'0'/'recipe.json').read_text())
    assert (told['augment'], told['compute'], told['number_format']) == ('batch', 'plain', 'float32')


def test_every_field_of_the_recipe_is_an_option():
    done = command('s9_train', '--help')
    text = done.stdout
    assert done.returncode == 0 and done.stderr == '' and max(map(len, text.splitlines())) < 125
    for f in fields(Recipe): assert f'--{f.name.replace("_", "-")} ({f.type.__name__})' in text and f'[{f.default}]' in text
    for o in ('--data', '--recipe', '--seed', '--workers', '--device', '--out', '--resume', '--force', '--save-every', '--deterministic'): assert f'{o} ' in text


bad = [('--recipe fastest', "'fastest', but must be one of stated, logged, sample, fast"), ('--epochs 0', 'epochs is 0, but must be 1 to 99999'),
       ('--epochs three', "'three' is not a whole number"), ('--lr -1', 'lr is -1.0'), ('--lr nan', 'lr is nan'), ('--dropout 1', 'dropout is 1.0'),
       ('--norm xx', "norm is 'xx'"), ('--policy xx', "policy is 'xx'"), ('--augment xx', "augment is 'xx', but must be 'item' or 'batch'"),
       ('--compute xx', "compute is 'xx', but must be 'fast' or 'plain'"), ('--n-channels 37', 'n_channels is 37'), ('--sched xx', "sched is 'xx', but must be 'step' or 'triangle' or 'plateau' or 'none'"),
       ('--seed -1', 'seed is -1'), ('--workers -1', 'workers is -1, but must be 0 to 256'), ('--device abacus', "device is 'abacus'"), ('--bs 0', 'bs is 0'),
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


# A run to go on with

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The same run with two epochs and with three"
    tmp = tmp_path_factory.mktemp('runs')
    for n in (2, 3):
        done = command('s9_train', '--data', 'sample', '--recipe', 'stated', '--epochs', n, '--bs', 250, '--n-channels', 8, '--save-every', 3, '--out', tmp/str(n))
        assert done.returncode == 0, done.stderr
    return tmp


@pytest.fixture
def two(runs, tmp_path): return shutil.copytree(runs/'2', tmp_path/'run')


def result(folder):
    "All that a run tells of its result, without the time that it took"
    history = pd.read_csv(folder/'history.csv').drop(columns='time').to_dict('records')
    return {'recipe': json.loads((folder/'recipe.json').read_text()), 'log': (folder/'log.txt').read_text(), 'history': history,
            **{k: v.tolist() for k, v in load_file(folder/'weights.safetensors').items()}}


def test_more_epochs_are_those_of_the_longer_run(runs, two):
    done = command('s9_train', '--resume', two, '--epochs', 3)
    assert (done.returncode, done.stderr) == (0, '') and 'going on from the end of epoch 2' in done.stdout
    assert '\nepoch   3  ' in done.stdout and 'epoch   2  ' not in done.stdout and 'after 3 epochs; the whole run is in ' in done.stdout
    assert result(two) == result(runs/'3') and result(two)['recipe']['epochs'] == 3


def test_a_complete_run_says_so_and_stays_as_it_is(runs, two):
    done = command('s9_train', '--resume', two)
    assert (done.returncode, done.stderr) == (0, '') and result(two) == result(runs/'2')
    assert f'{two} has had its 2 epochs: nothing is left to train, but --epochs adds some\n' in done.stdout and 'epoch   ' not in done.stdout
    for nm in ('curves.png', 'misclassified.png'): assert (two/nm).read_bytes() == (runs/'2'/nm).read_bytes()


def test_a_change_is_refused_or_forced_with_a_warning(runs, two):
    done = command('s9_train', '--resume', two, '--lr', 0.1, '--epochs', 3)
    assert (done.returncode, done.stdout) == (2, '') and result(two) == result(runs/'2')
    assert done.stderr == (f's9_train: {two}: settings have changed since the run stopped: lr was 0.05, is 0.1. Set them back, start a new run, or add --force '
                           'and get a result of both (see s9_train --help)\n')
    done = command('s9_train', '--resume', two, '--lr', 0.1, '--epochs', 3, '--force')
    assert done.returncode == 0 and done.stderr.count('\n') == 1 and done.stderr.startswith(f's9_train: {two} goes on with changed settings: ')
    told, rates = result(two)['recipe'], [h['lr'] for h in result(two)['history']]
    assert (told['epochs'], told['lr'], rates) == (3, 0.1, [0.05, 0.05, 0.1])


def test_a_run_without_its_history_is_refused(two):
    (two/'history.csv').unlink()
    done = command('s9_train', '--resume', two, '--epochs', 3)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'history.csv' in done.stderr and 'is gone, but had' in done.stderr and 'put it back' in done.stderr


def test_a_triangle_is_made_longer_by_force_alone(tmp_path):
    "Its rates would have been others from the first batch on, and what is refused leaves the run as it was"
    made = command('s9_train', '--data', 'sample', '--recipe', 'fast', '--epochs', 2, '--bs', 500, '--n-channels', 4, '--out', 'run', cwd=tmp_path)
    assert made.returncode == 0
    before = result(tmp_path/'run')
    done = command('s9_train', '--resume', 'run', '--epochs', 4, cwd=tmp_path)
    assert done.returncode == 2 and 'epochs was 2, is 4. Set them back' in done.stderr and result(tmp_path/'run') == before
    assert command('s9_train', '--resume', 'run', cwd=tmp_path).returncode == 0 and result(tmp_path/'run') == before
    done = command('s9_train', '--resume', 'run', '--epochs', 4, '--force', cwd=tmp_path)
    rates = [h['lr'] for h in result(tmp_path/'run')['history']]
    assert done.returncode == 0 and all(o > 0 for o in rates)
    assert rates[2:] == pytest.approx([0.3*(1 - pct)/0.8 for pct in (2.75/4, 3.75/4)])


def test_a_run_ends_where_it_is_told_to_end(two):
    "Killed in its third epoch, and then content with two"
    recipe, weights = two/'recipe.json', load_file(two/'weights.safetensors')
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), 'epochs': 3}))
    (two/'weights.safetensors').unlink()
    done = command('s9_train', '--resume', two, '--epochs', 2)
    assert (done.returncode, done.stderr) == (0, '') and 'has had its 2 epochs' in done.stdout
    told, about = json.loads(recipe.read_text()), read_tensors(two/'weights.safetensors')[1]
    assert told['epochs'] == json.loads(about['recipe'])['epochs'] == 2
    for k, v in load_file(two/'weights.safetensors').items(): assert v.equal(weights[k])


def test_a_rate_that_is_too_high_ends_in_one_line(tmp_path):
    "With the words that help: the same rate would fail again"
    done = command('s9_train', '--data', 'sample', '--recipe', 'stated', '--epochs', 2, '--bs', 500, '--n-channels', 4, '--lr', 999, '--out', 'run', cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert done.stderr.endswith('take a lower one. To go on from the last checkpoint: s9_train --resume run --force --lr RATE\n')


def test_a_name_that_is_no_text_in_a_terminal_that_knows_ascii_alone(tmp_path):
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    done = subprocess.run([bin/'s9_train', '--data', 'sample', '--out', b'\xff', '--recipe', 'ü'], capture_output=True, cwd=tmp_path, env=env)
    assert done.returncode == 2 and done.stderr.count(b'\n') == 1 and done.stderr.isascii() and done.stdout == b''


@pytest.mark.skipif(os.name == 'nt', reason='needs a shell of POSIX')
def test_a_command_whose_reader_has_gone():
    done = subprocess.run(['bash', '-c', f'{bin}/s9_summary | true; echo ${{PIPESTATUS[0]}}'], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('141\n', '')


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
