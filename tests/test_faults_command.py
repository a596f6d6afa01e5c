"Whatever is typed: it does what the help says, or one line says what is wrong, and nothing was trained or written"
import argparse
import json
import math
import os
import re
import shutil
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, fields
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from fastai.learner import Learner
from fastcore.xtras import working_directory
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import s9_fastai.cifar.loaders
import s9_fastai.app.given
import s9_fastai.app.train
from s9_fastai.cifar.load import load_cifar
from s9_fastai.app.recipe import RECIPES, Recipe, get_recipe
from s9_fastai.cifar.facts import data_path
from s9_fastai.app.run import open_run
from s9_fastai.core.weights import save_weights
from s9_fastai.app.train import main_summary, main_train

mains = {'s9_train': main_train, 's9_summary': main_summary}
posix = pytest.mark.skipif(os.name == 'nt', reason='Windows has other rules for names')


def fuzz(n): return settings(derandomize=True, deadline=None, max_examples=n, database=None)


class Accepted(BaseException): "Everything was checked, and the run folder is there: the first batch would come now"


def typed(command, *args):
    "What a command makes of its options, in a folder of its own: exit code or 'accepted', output, errors, files that it left"
    out, err, code, threads = StringIO(), StringIO(), 0, torch.get_num_threads()
    with TemporaryDirectory() as tmp, ExitStack() as stack:
        for o in (working_directory(tmp), redirect_stdout(out), redirect_stderr(err), patch.object(sys, 'argv', [command, *args])): stack.enter_context(o)
        try: mains[command]()
        except SystemExit as e: code = e.code
        except Accepted: code = 'accepted'
        finally: torch.set_num_threads(threads)
        left = [p.name for p in Path(tmp).rglob('*')]
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), left=left)


def check_refused(command, got):
    assert (got.code, got.out, got.left) == (2, '', [])
    assert got.err.startswith(f'{command}: ') and got.err.endswith('\n') and got.err[:-1].isprintable()


def check_accepted(got):
    assert (got.code, got.err, got.out.count('\n')) == ('accepted', '', 1) and 'recipe.json' in got.left
    assert got.out.startswith('to resume this run if it stops: s9_train --resume ')


def refusal(command, *args):
    "The one line with which a command refuses its options, when it has left nothing behind"
    got = typed(command, *args)
    check_refused(command, got)
    return got.err


@pytest.fixture(scope='module', autouse=True)
def run(tmp_path_factory):
    "A run of two epochs; from then on nothing is trained any more, and the sample is decoded once"
    data, folder = load_cifar('sample'), tmp_path_factory.mktemp('run')/'run'
    sets = {'sample': data, 'others': data._replace(key='0123456789abcdef', source='others')}
    def load(path=None, **kwargs): return sets[path] if path in sets else load_cifar(path, **kwargs)
    def there(path, *args): return path if path in sets else data_path(path, *args)
    def accept(self):
        self.checkpoint.release()
        raise Accepted
    with pytest.MonkeyPatch.context() as m:
        m.setattr(s9_fastai.cifar.loaders, 'load_cifar', load)
        m.setattr(s9_fastai.app.given, 'data_path', there)
        with patch('s9_fastai.app.training.finish'):
            assert typed('s9_train', '--data', 'sample', '--recipe', 'stated', '--epochs', '2', '--bs', '500', '--n-channels', '4', '--out', str(folder)).code == 0
        m.setattr(Learner, '_do_fit', accept)  # the settings are compared before it
        yield folder


# Each option, with anything

def parser_of(command):
    found = []
    def stop(parser):
        found.append(parser)
        raise SystemExit
    with patch('s9_fastai.app.command.parsed_options', stop), suppress(SystemExit): mains[command]()
    return found[0]


options = {(c, a.option_strings[-1]): a for c in mains for a in parser_of(c)._actions if a.help != argparse.SUPPRESS and a.dest != 'help'}
valued = [k for k, a in options.items() if a.nargs != 0]

anything = dict(
    wrong_type=st.sampled_from(['word', '1.5', '0x10', '1,5', '1e2', '[]', 'None', 'true', '--', 'sample ', 'CPU', 'meta', 'hpu', 'mkldnn', 'cpu:-1',
                                '~nobody-of-this-name']),
    negative=st.integers(max_value=-1).map(str) | st.floats(max_value=-1e-300, allow_infinity=False).map(str),
    zero=st.sampled_from(['0', '0.0', '-0', '0e0', '00', '1e-320']),
    huge=st.integers(10**3, 10**30).map(str) | st.floats(1000, allow_infinity=False).map(str),
    empty=st.sampled_from(['', ' ', '\t\n']),
    non_ascii=st.text(st.characters(min_codepoint=128), min_size=1, max_size=9) | st.sampled_from(['３', '٣٨', 'ü', os.fsdecode(b'\xff')]),
    not_a_number=st.sampled_from(['nan', 'NaN', '-nan', 'inf', '-inf', '1e400', '-Infinity']),
    endless=st.sampled_from(['x', '1', 'ü', 'x y ']).map(lambda s: s*5000),
    zero_byte=st.sampled_from(['\0', 'a\0b', '5\0', 'cpu\0']))


def is_name(text):
    "Can a folder be called so? On the systems of today"
    try: return 0 < len(text.encode()) < 256 and '\0' not in text and not text.startswith('~')
    except UnicodeEncodeError: return False


def base(command, flag):
    "What else must be given"
    if flag == '--teacher': return ['--data', 'sample', '--distill', '0.9']
    return ['--data', 'sample'] if command == 's9_train' and flag not in ('--data', '--resume') else []


def is_zero(text):
    try: return float(text) == 0
    except ValueError: return False


elsewhere = {'--teacher': lambda o: False, '--distill': is_zero,  # more than 0 only with a teacher
             '--data': lambda o: o in ('sample', 'others'), '--resume': lambda o: False, '--out': is_name, '--device': lambda o: re.fullmatch(r'cpu(:\d+)?', o)}


def documented(flag, action, text):
    "Does the help of the option allow `text`? It tells the range of a number, and the words of a choice"
    if flag in elsewhere: return elsewhere[flag](text)
    if action.type is str: return text in re.findall(r"'(\w+)'", action.help)
    least, below, most = re.findall(r'([\d.e-]+) to (below )?([\d.e-]+)', action.help)[-1]
    try: v = action.type(text)
    except ValueError: return False
    return float(least) <= v <= float(most) and not (below and v == float(most)) and not ('even' in action.help and v % 2)


@pytest.mark.parametrize('command, flag', valued, ids=[' '.join(k) for k in valued])
def test_an_option_takes_what_its_help_says_and_nothing_else(command, flag):
    @fuzz(30 if flag == '--out' else 60)
    @given(st.one_of(*anything.values()))
    def check(text):
        got = typed(command, *base(command, flag), f'{flag}={text}')
        if got.code == 2: check_refused(command, got)
        elif command == 's9_summary': assert (got.code, got.err, got.left) == (0, '', []) and got.out.startswith('Layer')
        else: check_accepted(got)
        assert got.code == 2 or documented(flag, options[command, flag], text)
    check()


@pytest.mark.parametrize('command, flag', options, ids=[' '.join(k) for k in options])
def test_an_option_without_a_value_or_a_flag_with_one(command, flag):
    assert flag in refusal(command, flag if (command, flag) in valued else f'{flag}=x')


nothing, long = ['', ' ', 'ü', 'a\0b', 'x'*5000], '9'*5000
no_whole = [*nothing, 'word', '1.5', 'nan', 'inf', '1e400', '-1', '-0.5', long, '99999999999999999999999999']
no_number = [*nothing, 'word', '1,5', 'nan', 'inf', '-inf', '1e400', '-1', '-1e-9', '-1e300', long, '1e308']
refused = {
    '--data': [*nothing, 'nowhere', '-1', '0', 'nan', '~nobody-of-this-name'], '--recipe': [*nothing, 'fastest', 'Stated', '0', '-1', 'nan'],
    '--seed': [*no_whole, '4294967296'], '--threads': [*no_whole, '0', '1025'], '--workers': [*no_whole, '257', '1000000'], '--save-every': [*no_whole, '0', '1000000'],
    '--device': [*nothing, 'abacus', 'meta', 'hpu', '0', '-1', 'cpu:-1', 'nan'], '--out': ['', 'a\0b', 'x'*5000, 'x/'*5000, '~nobody-of-this-name'],
    '--resume': [*nothing, 'nowhere', '0', '-1', 'nan', '.', 'x/'*5000], '--teacher': [*nothing, 'nowhere', '0', '-1', 'nan', '.', 'x/'*5000],
    '--distill': [*no_number, '1', '0.5'], '--n-channels': [*no_whole, '0', '1', '37', '1026', '2147483648'],
    '--norm': [*nothing, 'xx', 'BN', '0'], '--dropout': [*no_number, '1', '1.5'], '--policy': [*nothing, 'xx', '0'], '--augment': [*nothing, 'items', '0'],
    '--compute': [*nothing, 'slow', '0'], '--bs': [*no_whole, '0', '1048577'], '--epochs': [*no_whole, '0', '100000'], '--lr': [*no_number, '0', '1e-13', '1000'],
    '--mom': [*no_number, '1'], '--wd': [*no_number, '1000'], '--sched': [*nothing, 'steps', '0'], '--step-size': [*no_whole, '0', '1000001'],
    '--gamma': [*no_number, '0', '1e-13', '1000'], '--arch': [*nothing, 'resnet19', 'Net', 'hf-hub:timm/resnet18', 'timm/', '0'],
    '--pretrained': [*nothing, 'nowhere', '.', 'x/'*5000], '--freeze-epochs': [*no_whole, '100', '99999']}


def test_the_table_is_of_options_that_are_there(): assert set(refused) <= {flag for _, flag in valued}


@pytest.mark.parametrize('flag', refused)
def test_what_must_be_refused(flag):
    for text in refused[flag]:
        for command in [c for c, f in valued if f == flag]: refusal(command, *base(command, flag), f'{flag}={text}')


ends = ['--seed 0 --workers 256 --save-every 999999 --device cpu --bs 1048576 --lr 999 --gamma 1e-12',
        '--seed 4294967295 --n-channels 2 --bs 1 --norm ln --workers 0', '--n-channels 1024 --dropout 0 --mom 0 --wd 0 --lr 1e-12 --save-every 1',
        '--epochs 99999 --step-size 1 --gamma 1', '--epochs 1 --step-size 1 --gamma 999 --lr 1', '--sched plateau --gamma 0.999',
        '--step-size 1000000 --gamma 999 --policy none --augment batch --compute plain', '--sched none', '--seed ３ --out １']


@pytest.mark.parametrize('args', ends)
def test_the_ends_of_the_ranges_are_allowed(args):
    check_accepted(typed('s9_train', '--data', 'sample', '--recipe', 'stated', *args.split()))


# What a user reads

x5000 = 'x'*5000
read = {  # fault: options, and what the message says
    'an option of the wrong type': ("--epochs three", "argument --epochs: 'three' is not a whole number"),
    'a negative number': ('--bs -1', 'bs is -1, but must be 1 to 1048576'),
    'zero': ('--epochs 0', 'epochs is 0, but must be 1 to 99999'),
    'a huge number': ('--workers 1000000', 'workers is 1000000, but must be 0 to 256'),
    'a huge Net': ('--n-channels 2147483648', 'n_channels is 2147483648, but must be 2 to 1024'),
    'a seed that is too large': ('--seed 4294967296', 'seed is 4294967296, but must be 0 to 4294967295'),
    'no batch to save after': ('--save-every 0', 'save_every is 0, but must be 1 to 999999'),
    'an empty value': ('--out=', "out is '', an empty text; give a path, '.' for the current folder"),
    'an empty folder to go on in': ('--resume=', "resume is '', an empty text"),
    'a non-ASCII value': ('--lr ü', "argument --lr: 'ü' is not a number"),
    'not a number (nan)': ('--lr nan', 'lr is nan, but must be 1e-12 to below 1000'),
    'an infinite number': ('--wd 1e400', 'wd is inf, but must be 0 to below 1000'),
    'a rate that leaves its range': ('--gamma 100', 'gamma is 100.0, which makes lr 5.0e+06 within 100 epochs, but it must stay below 1000: take a lower gamma'),
    'an endless value': (f'--recipe {x5000}', "xxx', but must be 'stated', 'logged', 'sample', 'fast'"),
    'characters that no terminal can show': ('--recipe \x1b[31m', "recipe is '\\x1b[31m', but must be 'stated'"),
    'a device that is not there': ('--device abacus', "device is 'abacus', but this machine has no such device: use cpu"),
    'a device that computes nothing': ('--device meta', "device is 'meta', but this machine has no such device: use cpu"),
    'a batch of one image for batch norm': ('--bs 1', 'bs is 1, so that a batch of the 2000 training images has only 1 image'),
    'an unknown option': ('--speed 3', 'unrecognized arguments: --speed 3'),
    "an option of fastcore's own commands": ('--pdb', 'unrecognized arguments: --pdb'),
    'a folder whose name is too long': (f'--out {x5000}', 'which cannot be written (File name too long): name another folder'),
    'a folder whose name has a zero byte': ('--out a\0b', "out is 'a\\x00b', which cannot be written (embedded null byte): name another folder"),
    'a folder whose name is not UTF-8': ('--out ' + os.fsdecode(b'a\xff'), 'a name that is not UTF-8: give the folder another one'),
    'a folder in a folder in …, a thousand times': ('--out ' + 'a/'*1500, 'cannot be written'),
    'a file in the place of the folder': (f'--out {__file__}', 'which is a file: name a folder'),
    'another folder than a new one': (f'--out {Path(__file__).parent}', 'a folder that is not empty: name another one (see'),
    'a weight for a teacher, but none for these images': ('--distill 0.9', 'the teacher in the package: this teacher was trained on other images: take one trained on the same data'),
    'an option that the schedule has no use for': ('--recipe fast --step-size 3', "step_size is 3, but sched is 'triangle', which does not use it: leave it out, or take sched 'step'"),
    'a teacher that is nowhere': ('--distill 0.9 --teacher nowhere', 'nowhere: no recipe.json there; name the folder of a run of s9_train'),
    'a teacher, but no weight for it': ('--teacher nowhere', '--teacher needs a distillation weight: add --distill 0.9'),
    'a new run, forced': ('--force', '--force needs --resume: a new run has no settings to keep'),
}


@posix
@pytest.mark.parametrize('what', read)
def test_what_a_user_reads(what, fault):
    args, msg = read[what]
    message = refusal('s9_train', *([] if 'resume' in args else ['--data', 'sample', '--recipe', 'stated'][:2 if '--recipe' in args else 4]), *args.split(' '))
    assert msg in message
    fault('command', what, message.replace(__file__, '…').replace(str(Path(__file__).parent), '…'))


# A run to go on with, or to learn from

@pytest.fixture
def copy(run, tmp_path):
    "A copy of the run, to do it harm"
    return Path(shutil.copytree(run, tmp_path/'run'))


def taught(run, *args): return '--data', 'sample', '--distill', '0.9', '--teacher', str(run), *args


def as_teacher(run):
    save_weights(get_recipe('sample', n_channels=4).net(), run/'weights.safetensors')  # `finish` did not run
    return run


def test_a_teacher(copy):
    got = typed('s9_train', *taught(as_teacher(copy)))
    check_accepted(got)
    assert 'teacher.safetensors' in got.left


def test_a_teacher_that_is_not_finished(copy, fault):
    message = refusal('s9_train', *taught(copy))
    assert 'this run is not finished: s9_train --resume' in message
    fault('command', 'a teacher that is not finished', message)


def test_a_teacher_of_other_images(copy, fault):
    message = refusal('s9_train', *taught(as_teacher(copy), '--data', 'others'))
    assert 'this teacher was trained on other images: take one trained on the same data' in message
    fault('command', 'this teacher was trained on other images', message)


def test_a_teacher_that_has_seen_what_is_held_out(copy, fault):
    message = refusal('s9_train', *taught(as_teacher(copy), '--held-out', '500'))
    assert 'trained with held_out 0, so it has seen images that are held out now: train one with held_out 500' in message
    fault('command', 'a teacher that has seen the images that are held out', message)


def test_a_teacher_whose_weights_are_damaged(copy, fault):
    (as_teacher(copy)/'weights.safetensors').write_bytes(b'0'*99)
    message = refusal('s9_train', *taught(copy))
    assert 'not a safetensors file, or a damaged one' in message
    fault('command', 'a teacher whose weights are damaged', message)


def content(folder): return {p: p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


changed = {  # fault: options, and what the message says
    'settings that have changed since the run stopped': ('--lr 0.1 --epochs 3', 'settings have changed since the run stopped: lr was [0.05], is [0.1]. Set them back, name a new folder'),
    'another seed': ('--seed 7 --epochs 3', 'settings have changed since the run stopped: seed was 42, is 7. Set them back'),
    'other batches': ('--bs 250', 'bs was 500, is 250'),
    'other images': ('--data others --epochs 3', '(these are other images). Set them back'),
    'a change when nothing is left to train': ('--lr 0.1 --force', 'lr was [0.05], is [0.1]. It has had its epochs, so they would change nothing: set them back, or take more epochs'),
    'another Net': ('--n-channels 6 --force', 'n_channels was 4, is 6. Set them back or start a new run: what this one has saved does not fit'),
    'fewer epochs than the run has had': ('--epochs 1', 'has had 2: give as many or more, or start a new run'),
    'fewer epochs, forced, with data': ('--epochs 1 --force --data sample', 'has had 2: give as many or more, or start a new run'),
    'a run to go on with, and a folder for a new one': ('--out new', '--out is for a new run and --resume for an existing one: leave one out'),
    'a run to go on with, and another recipe': ('--recipe logged', '--recipe is for a new run and --resume for an existing one: leave one out'),
    'a run to go on with, and a teacher': ('--teacher elsewhere', '--teacher is for a new run and --resume for an existing one: leave one out'),
    'a run to go on with, and no name for the recipe': ('--recipe=', '--recipe is for a new run'),
    'a bad option for a run to go on with': ('--epochs 3 --workers 257', 'workers is 257, but must be'),
}


@pytest.mark.parametrize('what', changed)
def test_a_run_is_not_changed_by_what_does_not_fit(copy, fault, what):
    args, msg = changed[what]
    before = content(copy)
    message = refusal('s9_train', '--resume', str(copy), *args.split())
    assert msg in message and content(copy) == before
    fault('command', what, message)


def told(change):
    "The bytes of recipe.json with the fields in `change`"
    return lambda good: json.dumps({**json.loads(good), **change}).encode()


damage = {  # fault: new content, and what the message says
    'an empty recipe.json': (lambda good: b'', 'not JSON ('),
    'a damaged recipe.json': (lambda good: good[:100], 'not JSON ('),
    'a recipe.json that is not text': (lambda good: b'\xff\xfe' + good, 'not JSON ('),
    'a recipe.json that is a list': (lambda good: b'[]', 'not a JSON object'),
    'a recipe.json that says nothing': (lambda good: b'null', 'not a JSON object'),
    'a recipe.json of nested lists': (lambda good: b'['*100_000, 'not JSON ('),
    'a recipe.json of 10 MB': (lambda good: b' '*10**7 + good, 'more than the 1048576 bytes that are allowed ('),
    'a recipe.json without a field': (lambda good: good.replace(b'"seed"', b'"sead"'), 'seed is missing'),
    'a recipe.json with NaN': (told(dict(lr=math.nan)), 'lr is nan, but must be 1e-12 to below 1000'),
    'a recipe.json with Infinity': (told(dict(wd=math.inf)), 'wd is inf, but must be 0 to below 1000'),
    'a recipe.json with text for a number': (told(dict(lr='0.05')), "lr is '0.05', but must be of type float"),
    'a recipe.json with a list for a text': (told(dict(cpu=[1])), 'cpu is a list'),
    'a recipe.json with a seed out of range': (told(dict(seed=-1)), 'seed is -1, but must be 0 to 4294967295'),
    'a recipe.json with too many workers': (told(dict(workers=10**6)), 'workers is 1000000, but must be 0 to 256'),
    'a recipe.json with a number for a name': (told(dict(name=3)), 'name is 3'),
    'a recipe.json with a rate that leaves its range': (told(dict(gamma=999, step_size=1, epochs=99_999)), 'gamma is 999.0, which makes lr inf'),
}


@pytest.mark.parametrize('what', damage)
def test_a_recipe_json_that_cannot_be_read(copy, fault, what):
    make, msg = damage[what]
    path = copy/'recipe.json'
    path.write_bytes(make(path.read_bytes()))
    message = refusal('s9_train', '--resume', str(copy), '--epochs', '3')
    assert message.startswith(f's9_train: {path}: {msg}') and re.search('; put (the file back as it was|a sound file in its place) [(]see', message)
    fault('command', what, message)


def test_a_field_that_nobody_knows(copy, fault):
    (copy/'recipe.json').write_bytes(told(dict(speed=1))((copy/'recipe.json').read_bytes()))
    fault('command', 'a recipe.json with an unknown field', refusal('s9_train', '--resume', str(copy)))


@posix
@pytest.mark.parametrize('what, make', {
    'a run folder without recipe.json': Path.mkdir, 'a file in the place of the run folder': Path.touch, 'a run folder that is not there': lambda p: None,
    'a folder in the place of recipe.json': lambda p: (p/'recipe.json').mkdir(parents=True),
    'a pipe in the place of recipe.json': lambda p: p.mkdir() or os.mkfifo(p/'recipe.json'),
    'a recipe.json that links to itself': lambda p: p.mkdir() or (p/'recipe.json').symlink_to('recipe.json')}.items())
def test_a_folder_that_is_no_run(tmp_path, fault, what, make):
    make(tmp_path/'run')
    message = refusal('s9_train', '--resume', str(tmp_path/'run'))
    why = {'a recipe.json that links to itself': 'cannot be read', 'a file in the place of the run folder': 'a file'}
    assert why.get(what, 'no recipe.json there; name the folder of a run of s9_train') in message
    fault('command', what, message)


histories = {  # fault: new content, and what the message says
    'a history with a renamed column': (lambda old: old.replace(b'epoch', b'Epoch'), 'line 2: epoch is None, but must be 1'),
    'a history of other text': (lambda old: b'dear diary\n'*99, 'its lines are longer'),
    'a history that is not UTF-8': (lambda old: b'\xff\xfe' + old, "'utf-8' codec can't decode"),
    'a history of zeros': (lambda old: bytes(len(old)), 'its lines are longer or shorter than they were'),
    'a history of one long line': (lambda old: b'x'*10**7, 'its lines are longer or shorter than they were'),
    'a history with a word for a number': (lambda old: re.sub(rb'\n2,\d', b'\n2,a', old), "line 3: train_loss is 'a"),
    'a history without its first epoch': (lambda old: old.replace(b'\n1,', b'\n3,'), 'line 2: epoch is 3, but must be 1'),
    'a history that a spreadsheet has saved': (lambda old: old.replace(b',', b';').replace(b'\n', b'\r\n'), 'its lines are longer'),
}


@pytest.mark.parametrize('what', histories)
def test_a_history_is_checked_before_the_training(copy, fault, what):
    make, msg = histories[what]
    path = copy/'history.csv'
    path.write_bytes(make(path.read_bytes()))
    before = content(copy)
    for more in (['--epochs', '3'], []):  # more to train, and nothing but the curves
        message = refusal('s9_train', '--resume', str(copy), *more)
        assert message.startswith(f's9_train: {path}: not the history of this run (') and msg in message and content(copy) == before
    fault('command', what, message)


def test_a_run_under_way_keeps_its_recipe(copy):
    "Another process has the lock: `recipe.json` must go on to say what that process does"
    before = content(copy)
    with FileLock(copy/'checkpoints'/'lock'):
        message = refusal('s9_train', '--resume', str(copy), '--epochs', '5')
        assert 'another process' in message and (str(os.getpid()) in message or not Path('/proc/self/fd').exists())
    assert content(copy) == before
    assert typed('s9_train', '--resume', str(copy), '--epochs', '5').code == 'accepted'
    assert json.loads((copy/'recipe.json').read_text())['epochs'] == 5


def test_two_runs_in_one_second_have_two_folders(tmp_path):
    with working_directory(tmp_path), patch.object(sys, 'argv', ['s9_train', '--data', 'sample']):
        for _ in range(3):
            with pytest.raises(Accepted): main_train()
        assert len(list(Path('runs').iterdir())) == 3


def test_the_home_folder_has_a_short_name(tmp_path, monkeypatch):
    "A shell does not know it in the middle of a word, as in --out=~/run"
    monkeypatch.setenv('HOME', str(tmp_path)), monkeypatch.setenv('USERPROFILE', str(tmp_path))
    assert typed('s9_train', '--data=sample', '--out=~/run').code == 'accepted' and (tmp_path/'run'/'recipe.json').exists()


# Any recipe

good = {**asdict(RECIPES['sample']), 'name': 'sample', 'seed': 42, 'workers': 0, 'device': 'cpu', 'save_every': None, 'deterministic': False,
        'data': 'sample', 'data_key': '1'}
scalars = st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -10**400, 2**31, 2**63]) | st.floats() | st.text(max_size=9)
values = st.recursive(scalars, lambda o: st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=3), o, max_size=3), max_leaves=6)


def check_read(folder, data):
    "`open_run` of a recipe.json with the content `data`: a sound recipe, or an error that names the file"
    (folder/'recipe.json').write_bytes(data)
    try: run = open_run(folder)
    except ValueError as e: assert type(e) is ValueError and str(e).startswith(str(folder/'recipe.json'))
    else:
        recipe, options = run.recipe, run.options
        assert Recipe(**asdict(recipe)) == recipe and recipe.net() and options.seed in range(2**32) and options.workers in range(257)
        return recipe


def test_a_recipe_json_of_changed_bytes(tmp_path):
    data, read = json.dumps(good, indent=2).encode(), []

    @fuzz(1200)
    @given(st.lists(st.tuples(st.integers(0, len(data)), st.integers(0, 9), st.binary(max_size=4) | st.sampled_from([b'9', b'NaN', b'-', b'e9', b'"'])),
                    min_size=1, max_size=3))
    def check(changes):
        new = data
        for i, n, put in changes: new = new[:i] + put + new[i + n:]
        read.append(check_read(tmp_path, new))
    check()
    assert any(read) and not all(read)


def test_a_recipe_json_of_changed_values(tmp_path):
    @fuzz(600)
    @given(st.dictionaries(st.sampled_from([*good, 'speed']), values, min_size=1, max_size=3) | values, st.booleans())
    def check(change, within):
        check_read(tmp_path, json.dumps({**good, **change} if within and isinstance(change, dict) else change).encode())
    check()


@fuzz(800)
@given(st.sampled_from([f.name for f in fields(Recipe)]), values | st.just(b'1') | st.complex_numbers(), values)
def test_a_recipe_of_anything(field, value, name):
    try: recipe = Recipe(**{field: value})
    except ValueError as e: assert type(e) is ValueError and str(e).startswith((field, 'Exceeds the limit'))
    else: assert recipe.net() and get_recipe('stated', **{field: value}) == recipe
    if name in RECIPES.values() or isinstance(name, str) and name in RECIPES: return
    with pytest.raises(ValueError, match='^recipe is '): get_recipe(name)
