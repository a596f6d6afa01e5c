"What surrounds a command: a terminal that is closed, an output that cannot be written, a second process, a folder that vanishes, Ctrl-C at any time"
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import decoded
import pandas as pd
import pytest
import torch
from fastcore.xtras import working_directory
from processes import quick_train, server
from safetensors.torch import load_file

import s9_fastai.app.training  # noqa: F401 (its warnings are not those of a command)
from s9_fastai.app.command import run_command
from s9_fastai.app.train import main_train, s9_train
from s9_fastai.resume.saved import newest_checkpoint

posix = pytest.mark.skipif(os.name == 'nt', reason='needs signals, pipes and terminals of POSIX')
args = ['--data', 'sample', '--bs', '500', '--n-channels', '4', '--out', 'run']


def ended(function, *argv, cwd='.', **env):
    "Exit code and messages of a command in this process"
    err, code = StringIO(), 0
    with ExitStack() as stack:
        for o in (working_directory(cwd), redirect_stdout(StringIO()), redirect_stderr(err), patch.object(sys, 'argv', ['s9_train', *map(str, argv)]), patch.dict(os.environ, env)): stack.enter_context(o)
        try: function()
        except SystemExit as e: code = e.code
    return code, err.getvalue()


# Whatever is raised

def subclasses(cls): return {cls} | {o for c in type.__subclasses__(cls) for o in subclasses(c)}


def made(cls):
    "Errors of the class `cls`, with a message and without; none where it needs more than that"
    for given in (('the\nmessage',), ()):
        with suppress(Exception): yield cls(*given)


def raised(e, module, **env):
    "Exit code and messages of a command in which a function of `module` raises `e`"
    names = {'__name__': module, 'e': e}
    exec('def fail(): raise e', names)
    def s9_test(): names['fail']()
    return ended(lambda: run_command(s9_test, ()), **env)


def test_every_exception_is_one_line_and_an_exit_code():
    seen, bad = set(), []
    for cls in sorted(subclasses(Exception), key=lambda c: (c.__module__, c.__qualname__)):
        for e, module in ((e, m) for e in made(cls) for m in ('s9_fastai.app.run', 'pandas.io')):
            code, text = raised(e, module)
            seen.add(cls)
            quiet = code == 141 and text == '' and isinstance(e, BrokenPipeError)
            if not quiet and (code not in (1, 2) or text.count('\n') != 1 or not text.startswith('s9_test: ')): bad.append((cls, code, text))
    assert bad == [] and len(seen) > 200
    assert {ValueError, KeyError, UnicodeError, MemoryError, OSError, RecursionError, pd.errors.ParserError} <= seen


def test_what_is_ours_is_about_the_input_and_all_else_is_named():
    assert raised(ValueError('lr is 5'), 's9_fastai.app.run') == (2, 's9_test: lr is 5 (see s9_test --help)\n')
    assert raised(ValueError('bad'), 'pandas.io') == (1, 's9_test: internal error: ValueError: bad (pandas.io, line 1); S9_TRACEBACK=1 in the environment prints the traceback for a report\n')
    assert raised(KeyError('lr'), 's9_fastai.app.run')[1].startswith("s9_test: internal error: KeyError: 'lr' (s9_fastai.app.run, line 1)")
    code, shown = raised(KeyError('lr'), 'x', S9_TRACEBACK='1')
    assert code == 1 and shown.startswith('Traceback (most') and shown.splitlines()[-1].startswith('s9_test: internal error')


# A training in another process

def child(cwd, argv, stream, env):
    "The life of a training whose output is `stream`: the number of a pipe or terminal, a file, or nothing at all"
    os.chdir(cwd)
    os.environ.update(env)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if env.get('NOHUP') else signal.SIG_DFL)  # whatever pytest was started with
    os.dup2(os.open('err', os.O_WRONLY | os.O_CREAT), 2)
    if stream is None:
        os.close(1)
        sys.stdout = None
    else:
        fd = stream.detach() if hasattr(stream, 'detach') else os.open(stream, os.O_WRONLY)
        if os.isatty(fd):
            import fcntl
            import termios
            os.setsid()
            fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
        os.dup2(fd, 1), os.close(fd)
        sys.stdout = open(1, 'w', closefd=False)
    sys.stderr = open(2, 'w', buffering=1, closefd=False)
    sys.argv = ['s9_train', *argv]
    decoded.use()
    from s9_fastai.app.entry import train
    train()


class Training:
    "A training in a process of its own"
    def __init__(self, cwd, *more, stream=None, **env):
        self.cwd = cwd
        self.p = server.Process(target=child, args=(str(cwd), [*args, *more], stream, {**decoded.variable(args), **env}))
        self.p.start()

    def end(self):
        "Its exit code and its messages"
        self.p.join(120)
        return self.p.exitcode, (self.cwd/'err').read_text()

    def signal(self, n): os.kill(self.p.pid, n)


def piped(cwd, *more, **env):
    "A training and the reader of its output, which has read the first line: the run is under way"
    from multiprocessing.reduction import DupFd
    reader, writer = os.pipe()
    training = Training(cwd, *more, stream=DupFd(writer), **env)
    os.close(writer)
    lines = open(reader)
    assert lines.readline() == 'to resume this run if it stops: s9_train --resume run\n'
    return training, lines


def check_resumable(run_dir):
    state, path = newest_checkpoint(run_dir)
    assert path.is_file() and 'model' in state and (run_dir/'recipe.json').is_file()


@posix
def test_a_closed_output_is_none_at_all(tmp_path):
    assert Training(tmp_path, '--epochs', '1').end() == (0, '')
    assert (tmp_path/'run'/'weights.safetensors').is_file() and not any(p.stat().st_size == 0 for p in (tmp_path/'run').glob('*.*'))


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_full_disk_below_the_output(tmp_path):
    code, err = Training(tmp_path, '--epochs', '1', stream='/dev/full').end()
    assert code == 1 and err.count('\n') == 1 and err.startswith('s9_train: ') and 'No space left on device' in err
    assert err.endswith('Resume from the last checkpoint: s9_train --resume run\n')
    check_resumable(tmp_path/'run')


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
@pytest.mark.parametrize('argv', ['--help', '--version'])
def test_help_on_a_full_disk(argv):
    "At its end Python would try once more, print two lines of its own and exit with 120"
    code = f"import sys; sys.argv = ['s9_train', '{argv}']; from s9_fastai.app.entry import train; train()"
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}
    with open('/dev/full', 'w') as full: done = subprocess.run([sys.executable, '-c', code], stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert done.returncode == 1 and done.stderr.startswith('s9_train: ') and done.stderr.endswith('[Errno 28] No space left on device\n') and done.stderr.count('\n') == 1


@posix
def test_a_reader_that_goes(tmp_path):
    training, lines = piped(tmp_path, '--epochs', '2')
    lines.close()
    assert training.end() == (141, '')
    check_resumable(tmp_path/'run')


@posix
def test_nohup_and_a_second_process_in_the_folder(tmp_path):
    training, lines = piped(tmp_path, '--epochs', '999', NOHUP='1')
    with lines:
        training.signal(signal.SIGHUP)
        code, err = ended(main_train, *args, cwd=tmp_path)
        who = f', {training.p.pid},' if Path('/proc/self/fd').exists() else ''
        assert code == 2 and err.count('\n') == 1 and f'another process{who}' in err and 'is training there' in err
        code, err = ended(main_train, '--resume', 'run', '--epochs', '1000', cwd=tmp_path)
        assert code == 2 and err.count('\n') == 1 and f'another process{who}' in err
        assert lines.readline().startswith('epoch   1 ')  # it continues
        training.signal(signal.SIGTERM)
        code, err = training.end()
    assert code == 143 and 'stopped by SIGTERM, saved in run at' in err
    check_resumable(tmp_path/'run')


@posix
def test_a_terminal_that_is_closed(tmp_path):
    from multiprocessing.reduction import DupFd
    master, slave = os.openpty()
    training = Training(tmp_path, '--epochs', '999', stream=DupFd(slave))
    os.close(slave)
    seen = b''
    while b'Epoch 2/' not in seen: seen += os.read(master, 4096)
    os.close(master)
    code, err = training.end()
    assert code == 129 and err.startswith('s9_train: stopped by SIGHUP, saved in run at ') and err.count('\n') == 1
    check_resumable(tmp_path/'run')


@posix
def test_a_folder_that_is_made_anew(tmp_path):
    "Nothing is written into the new one, and nobody is sent there to resume"
    training, lines = piped(tmp_path, '--epochs', '999')
    with lines:
        (tmp_path/'run').rename(tmp_path/'old')
        (tmp_path/'run').mkdir()
        shutil.rmtree(tmp_path/'old')
        code, err = training.end()
    assert code == 1 and err.count('\n') == 1 and '--resume' not in err
    assert err.endswith('run is no longer the folder of this run, so it cannot be resumed: start a new run\n')
    assert [*(tmp_path/'run').iterdir()] == []


# Ctrl-C

interrupted = """
import signal, sys
from importlib.abc import MetaPathFinder
class Interrupt(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == '{name}': signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ['s9_train', '--data', 'sample', '--out', 'run']
from s9_fastai.app.entry import train
train()
"""


@pytest.mark.parametrize('name', ['fastcore.docments', 'torch.nn'])
def test_ctrl_c_while_a_module_is_imported(name, tmp_path):
    done = subprocess.run([sys.executable, '-c', interrupted.format(name=name)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, '', 's9_train: stopped\n') and not (tmp_path/'run').exists()


# The same result with the same number of threads

def test_one_thread_is_the_same_whatever_the_environment_has(tmp_path, no_pictures):
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    more, n = ['--epochs', '1', '--threads', '1'], torch.get_num_threads()
    env = {**os.environ, **decoded.variable(args), 'OMP_NUM_THREADS': '2'}
    assert subprocess.run([sys.executable, quick_train, *args, *more], cwd=tmp_path/'a', env=env, capture_output=True).returncode == 0
    assert ended(main_train, *args, *more, cwd=tmp_path/'b') == (0, '')
    torch.set_num_threads(n)
    a, b = (load_file(tmp_path/o/'run'/'weights.safetensors') for o in 'ab')
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    assert {json.loads((tmp_path/o/'run'/'recipe.json').read_text())['threads'] for o in 'ab'} == {1}


def test_python_keeps_its_exceptions(tmp_path):
    "Lines and exit codes are the command's; a program gets the exception"
    with pytest.raises(ValueError, match='threads is 0, but must be 1 to 1024'): s9_train('sample', threads=0, out=tmp_path/'run')
    assert not (tmp_path/'run').exists()
