"""Scripts in processes of their own, forked from one that has loaded the large libraries: what another process would do, without the seconds that
it takes to start"""
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import warnings
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory

import decoded

bin = Path(sys.executable).parent  # with the commands of the package
quick_train = Path(__file__).parent/'train_without_pictures.py'
server = multiprocessing.get_context('forkserver')
# of others only: the package itself is imported anew in each process
preloaded = ['torch', 'torchvision', 'pandas', 'matplotlib.pyplot', 'albumentations', 'fastai.learner', 'fastai.vision.learner']
server.set_forkserver_preload(preloaded)


def use_server(address):
    "What this process starts with `forkserver` comes from the same server; a pipe to it is there already"
    own = forkserver._forkserver
    own._forkserver_address, own.ensure_running = address, resource_tracker.ensure_running


def main(path, args, cwd, env, out, err, is_group, method, address=None):
    "The life of the process: `path` as Python runs it from a shell"
    gc.freeze()  # what the server has loaded: the collector would copy all of its memory pages
    if is_group: os.setsid()
    for fd, file in ((1, out), (2, err)): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = [path, *args], str(Path(path).parent)
    warnings.simplefilter('ignore')
    decoded.use()
    if address: use_server(address)
    multiprocessing.set_start_method(method, force=True)  # its workers start as they do from a shell, not by the server
    of_method = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: of_method('forkserver' if method == 'spawn' else method)  # from the same server
    runpy.run_path(path, run_name='__main__')


class Script:
    "As `subprocess.Popen` of Python with the script `path`, its output captured as text, and `env` beside the present environment; alone in a group?"
    def __init__(self, path, *args, cwd='.', is_group=False, **env):
        self.tmp = TemporaryDirectory()
        self.args, (self.out, self.err) = [str(path), *map(str, args)], (Path(self.tmp.name)/nm for nm in ('out', 'err'))
        env = {**os.environ, **decoded.variable(args), **env}
        forkserver.ensure_running()
        self.p = server.Process(target=main, args=(str(path), self.args[1:], str(cwd), env, str(self.out), str(self.err), is_group,
                                                   multiprocessing.get_start_method(), forkserver._forkserver._forkserver_address))
        self.p.start()
        self.pid = self.p.pid

    @property
    def stdout(self): return self.out.read_text(encoding='utf-8') if self.out.exists() else ''

    @property
    def stderr(self): return self.err.read_text(encoding='utf-8') if self.err.exists() else ''

    @property
    def returncode(self): return self.p.exitcode

    def wait_for(self, text):
        "Until its output has `text`"
        while text not in self.stdout:
            assert self.returncode is None, self.stderr
            time.sleep(0.02)

    def end(self):
        "When it has ended: its exit code and its output"
        self.p.join()
        with self.tmp: return subprocess.CompletedProcess(self.args, self.returncode, self.stdout, self.stderr)


def run(path, *args, **kwargs):
    "As `subprocess.run` of Python with the script `path`; see `Script`"
    return Script(path, *args, **kwargs).end()


def python(code, **env):
    "What Python prints for `code`, in a process that has not loaded the package"
    with TemporaryDirectory() as tmp:
        (Path(tmp)/'code.py').write_text(code, encoding='utf-8')
        done = run(Path(tmp)/'code.py', **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
