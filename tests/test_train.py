"The commands, as a user runs them: what they leave, what they print, and what they say when something is wrong"
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import decoded
import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.xtras import working_directory
from PIL import Image
from processes import bin, quick_train
from safetensors.torch import load_file

from s9_fastai.app.recipe import RECIPES, Recipe
from s9_fastai.nets.net import Net
from s9_fastai.app.options import STORED
from s9_fastai.app.checked import field_kind
from s9_fastai.app.run import open_run
from s9_fastai.resume.state import read_state, write_state
from s9_fastai.core.weights import read_tensors
from s9_fastai.app.command import BadInput
from s9_fastai.app.train import main_summary, main_train, s9_train

root = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name == 'nt', reason='needs a shell of POSIX')


mains = dict(s9_train=main_train, s9_summary=main_summary)


def process(*args, cwd=None):
    "A command in a process of its own, as a user has it"
    return subprocess.run([bin/args[0], *map(str, args[1:])], capture_output=True, text=True, cwd=cwd)


def command(*args, cwd='.'):
    "A command in this process, which has torch loaded and the sample decoded"
    out, err, code = StringIO(), StringIO(), 0
    with working_directory(cwd), redirect_stdout(out), redirect_stderr(err), patch.object(sys, 'argv', [*map(str, args)]):
        try: mains[args[0]]()
        except SystemExit as e: code = e.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "One epoch on the sample, in a pipe"
    cwd = tmp_path_factory.mktemp('cwd')
    done = process('s9_train', '--data', 'sample', '--epochs', 1, '--bs', 250, '--norm', 'ln', '--n-channels', 8, '--seed', 7, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, next((cwd/'runs').iterdir())


def test_run_folder_is_complete(run):
    names = ['checkpoints', 'curves.png', 'history.csv', 'log.txt', 'misclassified.png', 'recipe.json', 'report.html', 'weights.safetensors']
    assert sorted(p.name for p in run[1].iterdir()) == names


def test_recipe_is_resolved(run):
    told = json.loads((run[1]/'recipe.json').read_text())
    want = {**asdict(RECIPES['sample']), 'epochs': 1, 'bs': 250, 'norm': 'ln', 'n_channels': 8, 'seed': 7, 'name': 'sample', 'data': 'sample', 'workers': 0}
    assert {k: told[k] for k in want} == want
    assert {'torch', 'fastai', 'albumentations', 'data_key', 'device', 'python'} <= set(told)


def test_weights_fit_the_net(run):
    Net(norm='ln', n_channels=8).load_state_dict(load_file(run[1]/'weights.safetensors'))


def test_pictures_open(run):
    for nm in ('curves.png', 'misclassified.png'): assert np.asarray(Image.open(run[1]/nm)).std() > 5


def test_a_pipe_gets_whole_lines(run):
    first, epoch, *rest = run[0].stdout.splitlines()
    assert first == f'to resume this run if it stops: s9_train --resume runs/{run[1].name}'
    assert '\r' not in run[0].stdout and '█' not in run[0].stdout and epoch.startswith('epoch   1  train_loss ')
    acc = pd.read_csv(run[1]/'history.csv').valid_accuracy[0]
    classes = [rest.pop(1) for _ in range(2)]
    assert classes[0].startswith('best class: ') and classes[1].startswith('most frequent confusion: ')
    assert rest == [f'test accuracy {acc:.2%} after 1 epoch; guessing one of 10 classes gives 10%',
                    'that was with 2,000 training images, a sample of the 50,000 of CIFAR-10',
                    'with all of them, the recipe fast gives 85.7% and best gives 90.4%',
                    'next: s9_train --recipe fast (finds CIFAR-10, or downloads it: 168 MB)',
                    f'your own images: s9_predict IMAGE... --run runs/{run[1].name}', f'the report: runs/{run[1].name}/report.html', f'the whole run is in runs/{run[1].name}']


def test_nothing_else_is_printed(run): assert run[0].stderr == ''


def test_the_same_seed_gives_the_same_run(run, tmp_path, no_pictures):
    again = command('s9_train', '--data', 'sample', '--epochs', 1, '--bs', 250, '--norm', 'ln', '--n-channels', 8, '--seed', 7, '--workers', 2, '--out', tmp_path/'b')
    assert again.returncode == 0, again.stderr
    a, b = load_file(run[1]/'weights.safetensors'), load_file(tmp_path/'b'/'weights.safetensors')
    assert all((a[k] == b[k]).all() for k in a)
    for nm in ('log.txt', 'weights.safetensors'): assert (tmp_path/'b'/nm).read_bytes() == (run[1]/nm).read_bytes()


def test_a_run_of_version_0_1_0(run, tmp_path):
    "Its recipe.json has two fields under other names: it is read, and a resume names what has changed, the version first of all"
    shutil.copytree(run[1], tmp_path/'old')
    path = tmp_path/'old'/'recipe.json'
    text = path.read_text().replace('"ema":', '"average":').replace('"pct_start":', '"rise":')
    path.write_text(re.sub('"s9_fastai": "[^"]*"', '"s9_fastai": "0.1.0"', text))
    old, new = open_run(tmp_path/'old'), open_run(run[1])
    assert (old.recipe, old.options) == (new.recipe, new.options) and old.net()
    for path in (tmp_path/'old'/'checkpoints').glob('*.safetensors'):  # without what later versions save
        state = read_state(path)
        state.pop('changed')
        write_state(path, state)
    done = command('s9_train', '--resume', tmp_path/'old', '--epochs', 3)
    assert done.returncode == 2 and 'a checkpoint of s9_fastai 0.1.0, which later versions do not resume' in done.stderr


def test_whole_batches_and_plain_layers(tmp_path, no_pictures):
    "The other way of each switch; with and without workers the same weights"
    for w in (0, 2):
        done = command('s9_train', '--data', 'sample', '--recipe', 'stated', '--epochs', 1, '--bs', 250, '--n-channels', 8, '--augment', 'batch', '--compute', 'plain', '--workers', w, '--out', tmp_path/str(w))
        assert done.returncode == 0, done.stderr
    a, b = (load_file(tmp_path/w/'weights.safetensors') for w in '02')
    assert all((a[k] == b[k]).all() for k in a)
    told = json.loads((tmp_path/'0'/'recipe.json').read_text())
    assert (told['augment'], told['compute'], told['autocast_dtype']) == ('batch', 'plain', 'float32')


def test_every_field_of_the_recipe_is_an_option():
    done = command('s9_train', '--help')
    text = done.stdout
    assert done.returncode == 0 and done.stderr == '' and max(map(len, text.splitlines())) < 125
    for f in fields(Recipe): assert f'--{f.name.replace("_", "-")} ({field_kind(f).__name__})' in text and f'[{f.default}]' in text
    for o in ('--data', '--recipe', '--seed', '--workers', '--device', '--out', '--resume', '--force', '--save-every', '--deterministic', '--threads'): assert f'{o} ' in text


def test_the_stored_options_are_those_of_the_functions():
    assert runpy.run_path(str(root/'tools'/'options.py'))['made']() == STORED.read_text(encoding='utf-8'), 'run python tools/options.py'


light = {  # what needs no torch: options, exit code and message
    's9_train --help': (0, '--n-channels (int)'), 's9_train --version': (0, 's9_fastai '), 's9_train --epochss 3': (2, 'unrecognized arguments: --epochss 3'),
    's9_train --epochs three': (2, "'three' is not a whole number"), 's9_train --data nowhere': (2, 'nowhere: no such file or folder'),
    's9_train --data sample --out FILE': (2, 'which is a file: name a folder'), 's9_train --resume nowhere': (2, 'no recipe.json there'),
    's9_train --resume FILE': (2, 'a file; name the folder of a run'), 's9_train --data sample --distill 0.9 --teacher nowhere': (2, 'no recipe.json there'),
    's9_summary --help': (0, '--norm (str)'), 's9_summary --speed': (2, 'unrecognized arguments: --speed'),
    's9_predict --help': (0, 'Image files'), 's9_predict': (2, 'no image: name one or more files'), 's9_predict nofile.png': (2, 'nofile.png: no such file'),
    's9_export --help': (0, 'Folder of a finished run'), 's9_export nowhere': (2, 'no recipe.json there'), 's9_export pretrained --to zip': (2, "to is 'zip'"),
    's9_predict FILE --top 0': (2, 'top is 0'), 's9_predict FILE --json --csv': (2, 'json and csv are given'), 's9_predict FILE --onnx nowhere': (2, 'there is no such file'), 's9_predict FILE --run nowhere': (2, 'no recipe.json there'), 's9_predict FILE --rum x': (2, 'unrecognized arguments: --rum')}


def test_what_is_wrong_at_once_is_said_without_torch(tmp_path):
    "All in one process in which torch cannot be imported: whoever tried would end in an ImportError"
    (tmp_path/'FILE').write_text('x')
    code = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
sys.modules['torch'] = None
from s9_fastai.app.export import main_export
from s9_fastai.app.predict import main_predict
from s9_fastai.app.train import main_summary, main_train
mains, found = dict(s9_train=main_train, s9_summary=main_summary, s9_predict=main_predict, s9_export=main_export), {}
for line in json.loads(sys.stdin.read()):
    sys.argv, out, code = line.split(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(out):
        try: mains[sys.argv[0]]()
        except SystemExit as e: code = e.code
    found[line] = code, out.getvalue()
print(json.dumps(found))
"""
    env = {k: v for k, v in os.environ.items() if k != 'S9_CIFAR10'}
    done = subprocess.run([sys.executable, '-c', code], input=json.dumps([*light]), capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    for line, (got, out) in json.loads(done.stdout).items():
        want, msg = light[line]
        assert got == want and msg in out and (got == 0 or out.count('\n') == 1 and out.startswith(f'{line.split()[0]}: ')), line


bad = [('--recipe fastest', "'fastest', but must be 'stated', 'logged', 'sample', 'fast'"), ('--epochs 0', 'epochs is 0, but must be 1 to 99999'),
       ('--epochs three', "'three' is not a whole number"), ('--lr -1', 'lr is -1.0'), ('--lr nan', 'lr is nan'), ('--dropout 1', 'dropout is 1.0'),
       ('--norm xx', "norm is 'xx'"), ('--policy xx', "policy is 'xx'"), ('--augment xx', "augment is 'xx', but must be 'item' or 'batch'"),
       ('--compute xx', "compute is 'xx', but must be 'fast' or 'plain'"), ('--n-channels 37', 'n_channels is 37'), ('--sched xx', "sched is 'xx', but must be 'step', 'triangle', 'plateau' or 'none'"),
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


def test_more_epochs_are_those_of_the_longer_run(runs, two, no_pictures):
    done = command('s9_train', '--resume', two, '--epochs', 3)
    assert (done.returncode, done.stderr) == (0, '') and 'resuming from the end of epoch 2' in done.stdout
    assert '\nepoch   3  ' in done.stdout and 'epoch   2  ' not in done.stdout and 'after 3 epochs; guessing one of 10' in done.stdout
    assert result(two) == result(runs/'3') and result(two)['recipe']['epochs'] == 3


def state(folder):
    "Content and time of the last change of every file; the lock is empty"
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob('*') if p.is_file() and p.name != 'lock'}


def test_a_resumed_run_keeps_its_number_of_threads(runs, two, no_pictures):
    "Whatever torch has now; another number is refused as any other setting"
    n, there = torch.get_num_threads(), result(two)['recipe']['threads']
    try:
        torch.set_num_threads(there + 1)
        done = command('s9_train', '--resume', two, '--epochs', 3, '--threads', there + 1)
        assert done.returncode == 2 and f'settings have changed since the run stopped: threads was {there}, is {there + 1}. Set them back' in done.stderr
        assert command('s9_train', '--resume', two, '--epochs', 3).returncode == 0 and torch.get_num_threads() == there
    finally: torch.set_num_threads(n)
    assert result(two) == result(runs/'3')


def test_a_finished_run_stays_as_it_is(runs, two):
    before = state(two)
    done = command('s9_train', '--resume', two)
    assert (done.returncode, done.stderr) == (0, '') and 'epoch   ' not in done.stdout and 'train_loss' not in done.stdout
    assert done.stdout.endswith(f'{two} is finished: it has had its 2 epochs, and its files are unchanged. A larger --epochs makes it longer\n')
    assert [nm for nm, o in state(two).items() if o != before.get(nm)] == [] and len(before) > 8


def test_of_a_finished_run_only_what_is_missing_or_damaged_is_written(runs, two):
    before = state(two)
    (two/'curves.png').unlink(), (two/'misclassified.png').write_bytes(b'?')
    done = command('s9_train', '--resume', two)
    assert done.returncode == 0 and 'written again: curves.png, misclassified.png.' in done.stdout
    now = state(two)
    assert {nm for nm, o in now.items() if o != before[nm]} == {'curves.png', 'misclassified.png'}
    assert [nm for nm, o in now.items() if o[0] != before[nm][0]] == []


def test_pictures_of_a_shorter_training_are_replaced(runs, two):
    "Killed between its last epoch and its pictures, which are whole, but of two epochs"
    three = Path(shutil.copytree(runs/'3', two.parent/'three'))
    for nm in ('curves.png', 'misclassified.png', 'weights.safetensors'): shutil.copy2(two/nm, three/nm)
    assert command('s9_train', '--resume', three).returncode == 0
    assert result(three) == result(runs/'3')
    for nm in ('curves.png', 'misclassified.png'): assert (three/nm).read_bytes() == (runs/'3'/nm).read_bytes()


def test_a_change_is_refused_or_forced_with_a_warning(runs, two, no_pictures):
    done = command('s9_train', '--resume', two, '--lr', 0.1, '--epochs', 3)
    assert (done.returncode, done.stdout) == (2, '') and result(two) == result(runs/'2')
    assert done.stderr == (f's9_train: {two}: settings have changed since the run stopped: lr was [0.05], is [0.1]. Set them back, name a new folder, or force it '
                           'and get a result of both (see s9_train --help)\n')
    done = command('s9_train', '--resume', two, '--lr', 0.1, '--epochs', 3, '--force')
    assert done.returncode == 0 and done.stderr.count('\n') == 1 and done.stderr.startswith(f's9_train: {two} is resumed with changed settings: ')
    told, rates = result(two)['recipe'], [h['lr'] for h in result(two)['history']]
    assert (told['epochs'], told['lr'], rates) == (3, 0.1, [0.05, 0.05, 0.1])


def test_a_run_without_its_history_is_refused(two):
    (two/'history.csv').unlink()
    done = command('s9_train', '--resume', two, '--epochs', 3)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'history.csv' in done.stderr and 'is gone, but had' in done.stderr and 'put it back' in done.stderr


def test_a_history_that_cannot_be_drawn_at_the_end(two, monkeypatch):
    "It was changed while the run was under way: one line, and the checkpoints are there"
    for e, why in ((pd.errors.ParserError('line 3'), 'line 3'), (KeyError('lr'), "internal error: KeyError: 'lr'"), (UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad'), "'utf-8' codec")):
        def fail(*_, **__): raise e  # noqa: B023 (called at once)
        monkeypatch.setattr('s9_fastai.app.results.plot_curves', fail)
        done = command('s9_train', '--resume', two)
        assert done.returncode == 1 and done.stderr.count('\n') == 1 and done.stderr.startswith(f's9_train: {why}')
    monkeypatch.undo()
    assert command('s9_train', '--resume', two).returncode == 0


def test_a_triangle_is_made_longer_by_force_alone(tmp_path, no_pictures):
    "Its rates would have been others from the first batch on, and what is refused leaves the run as it was"
    made = command('s9_train', '--data', 'sample', '--recipe', 'fast', '--epochs', 2, '--bs', 500, '--n-channels', 4, '--out', 'run', cwd=tmp_path)
    assert made.returncode == 0
    before = result(tmp_path/'run')
    done = command('s9_train', '--resume', 'run', '--epochs', 4, cwd=tmp_path)
    assert done.returncode == 2 and 'n_epoch was 2, is 4. Set them back' in done.stderr and result(tmp_path/'run') == before
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
    assert (done.returncode, done.stderr) == (0, '') and 'it has had its 2 epochs; written again: weights.safetensors.' in done.stdout
    told, about = json.loads(recipe.read_text()), read_tensors(two/'weights.safetensors')[1]
    assert told['epochs'] == json.loads(about['recipe'])['epochs'] == 2
    for k, v in load_file(two/'weights.safetensors').items(): assert v.equal(weights[k])


def test_a_rate_that_is_too_high_ends_in_one_line(tmp_path):
    "With the words that help: the same rate would fail again"
    done = command('s9_train', '--data', 'sample', '--recipe', 'stated', '--epochs', 2, '--bs', 500, '--n-channels', 4, '--lr', 999, '--out', 'run', cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert done.stderr.endswith('take a lower one. Resume from the last checkpoint: s9_train --resume run --force --lr RATE\n')


def test_a_name_that_is_no_text_in_a_terminal_that_knows_ascii_alone(tmp_path):
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    done = subprocess.run([bin/'s9_train', '--data', 'sample', '--out', b'\xff', '--recipe', 'ü'], capture_output=True, cwd=tmp_path, env=env)
    assert done.returncode == 2 and done.stderr.count(b'\n') == 1 and done.stderr.isascii() and done.stdout == b''


@posix
def test_a_command_whose_reader_has_gone():
    done = subprocess.run(['bash', '-c', f'{bin}/s9_summary | true; echo ${{PIPESTATUS[0]}}'], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('141\n', '')


@posix
def test_a_training_whose_reader_has_gone_ends_quietly(tmp_path):
    args = f'{bin}/s9_train --data sample --epochs 2 --bs 500 --n-channels 4 --out run'
    done = subprocess.run(['bash', '-c', f'{args} | head -1; echo ${{PIPESTATUS[0]}}'], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ('to resume this run if it stops: s9_train --resume run\n141\n', '')


@posix
def test_ctrl_c_while_it_starts(tmp_path):
    "Most of the first seconds go by while torch is imported"
    p = subprocess.Popen([bin/'s9_train', '--data', 'sample', '--out', 'run'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=100)
    assert (p.returncode, out, err) == (130, '', 's9_train: stopped\n') and not (tmp_path/'run').exists()


def test_summary_prints_the_table():
    done = command('s9_summary')
    assert done.returncode == 0 and '99,912' in done.stdout and done.stderr == ''
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert command('s9_summary', '--norm', 'xx').returncode == 2


def test_from_python_bad_input_is_an_exception(tmp_path):
    with pytest.raises(BadInput, match='epochs is 0'): s9_train('sample', epochs=0, out=tmp_path/'run')
    with pytest.raises(BadInput, match="no field 'speed'"): s9_train('sample', speed=3, out=tmp_path/'run')
    assert not (tmp_path/'run').exists()


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no pseudo-terminals')
def test_a_terminal_of_80_columns_gets_bars_and_a_table(tmp_path):
    import fcntl
    import struct
    import termios
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    args = ['--data', 'sample', '--epochs', '1', '--bs', '500', '--n-channels', '4', '--out', 'run']
    env = {k: v for k, v in os.environ.items() if k != 'COLUMNS'} | decoded.variable(args)
    p = subprocess.Popen([sys.executable, quick_train, *args], stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, env=env)
    os.close(slave)
    seen = b''
    try:
        while data := os.read(master, 4096): seen += data
    except OSError: pass  # how Linux tells that the other end is closed
    text = seen.decode(errors='replace')
    lines = re.split('[\r\n]+', text)
    assert p.wait() == 0 and 'Epoch 1/1' in text and '█' in text
    assert max(map(len, lines)) <= 80
    head = next(i for i, ln in enumerate(lines) if ln.startswith('epoch  train_loss  valid_loss  train_accuracy  valid_accuracy  lr        time'))
    assert any(re.match(r'1      \d\.\d{6}    \d\.\d{6}    ', ln) for ln in lines[head:]), 'epochs count from 1, as the bar does'
    assert pd.read_csv(tmp_path/'run'/'history.csv').epoch.tolist() == [1]
