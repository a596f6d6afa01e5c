"""Scripts in processes of their own, forked from one that has loaded the large libraries: what another process would do, without the seconds that
it takes to start"""
import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

bin = Path(sys.executable).parent  # with the commands of the package
server = multiprocessing.get_context('forkserver')
# of others only: the package itself is imported anew in each process
preloaded = ['torch', 'torchvision', 'pandas', 'matplotlib.pyplot', 'albumentations', 'fastai.learner', 'fastai.vision.learner']
server.set_forkserver_preload(preloaded)


def main(path, args, cwd, env, out, err):
    "The life of the process: `path` as Python runs it from a shell"
    for fd, file in ((1, out), (2, err)): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = [path, *args], str(Path(path).parent)
    warnings.simplefilter('ignore')
    of_method = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: of_method('forkserver' if method == 'spawn' else method)  # from the same server
    runpy.run_path(path, run_name='__main__')


def run(path, *args, cwd='.', **env):
    "As `subprocess.run` of Python with the script `path`, its output captured as text, and `env` beside the present environment"
    with TemporaryDirectory() as tmp:
        out, err = Path(tmp)/'out', Path(tmp)/'err'
        args = [*map(str, args)]
        p = server.Process(target=main, args=(str(path), args, str(cwd), {**os.environ, **env}, str(out), str(err)))
        p.start()
        p.join()
        return subprocess.CompletedProcess([path, *args], p.exitcode, *(o.read_text(encoding='utf-8') if o.exists() else '' for o in (out, err)))
