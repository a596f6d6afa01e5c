"The measuring scripts run; what they measure is not judged here"
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run

folder = Path(__file__).resolve().parent.parent/'benchmarks'
scripts = sorted(f.relative_to(folder).as_posix() for f in folder.rglob('*.py'))
modules = 'common.py', 'speed/hosts.py', 'speed/methods.py', 'speed/rounds.py'


def bench(script, *args, **env): return run(folder/script, *args, cwd=folder.parent, **env)


# `--help` of each script in a fork of one process, which has imported the package: nothing of one script is there for the next
helps = """
import json, os, runpy, sys
from contextlib import redirect_stdout
from pathlib import Path
import s9_fastai.app.train, s9_fastai.app.learner, s9_fastai.app.predict
tmp, folder, scripts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]

def help_of(path, out):
    sys.argv, sys.path[0] = [str(path), '--help'], str(path.parent)
    with redirect_stdout(out):
        try: runpy.run_path(str(path), run_name='__main__')
        except SystemExit as e: return e.code or 0
    return 0

for i, script in enumerate(scripts):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(tmp/str(i), 'w') as out: code = help_of(folder/script, out)
        finally: os._exit(code)
    print(json.dumps([script, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), (tmp/str(i)).read_text()]))
"""


def test_each_imports_and_has_options(tmp_path):
    (tmp_path/'helps.py').write_text(helps)
    done = run(tmp_path/'helps.py', tmp_path, folder, *scripts, cwd=folder.parent)
    found = {script: (code, 'usage: ' in text) for script, code, text in map(json.loads, done.stdout.splitlines())}
    assert found == {script: (0, script not in modules) for script in scripts}, done.stderr


def test_there_are_scripts(): assert len(scripts) > 12 and {f.split('/')[0] for f in scripts} == {'common.py', 'speed', 'trust', 'accuracy'}


def test_a_run_prints_a_table_and_appends_lines(tmp_path):
    args = ['speed/loaders.py', '--out', tmp_path/'results', *'--data sample --images 300 --workers 0 --repeats 1 --methods'.split()]
    for methods, row, n in ((['fastai', 'item'], '| item path, 1 process ', 2), (['batch'], '| batch path, 1 process ', 3)):
        done = bench(*args, *methods)
        assert done.returncode == 0 and row in done.stdout, done.stderr
        lines = [json.loads(o) for o in (tmp_path/'results'/'loaders.jsonl').read_text().splitlines()]
        assert len(lines) == n
    o = lines[-1]
    assert o['n'] == 1 and o['values'] == [o['median']] and o['unit'] == 'images/s' and o['settings']['images'] == 300
    assert {'hardware', 'versions', 'commit', 'command', 'date'} <= o.keys() and o['command'].startswith('python benchmarks/speed/loaders.py --out')


def test_the_break_even_bandwidth_of_several_processes(monkeypatch):
    monkeypatch.syspath_prepend(folder/'speed')
    break_even, n_buckets, ring = map(runpy.run_path(str(folder/'speed'/'processes.py')).get, ('break_even', 'n_buckets', 'ring'))
    size, latency = 44_700_000, 1e-4
    assert [n_buckets(o) for o in (400_000, 2**20, 2**20 + 1, 26*2**20, 26*2**20 + 1)] == [1, 1, 2, 2, 3]
    for n in (2, 4, 8):  # at that bandwidth, the parts take as long as the whole
        bandwidth = break_even(size, n, 0.4, 0.4/n, latency)
        assert abs(0.4/n + ring(size, n, bandwidth, latency) - 0.4) < 1e-9
    assert ring(100, 2, 50, 0) == 2 and break_even(size, 2, 0.1, 0.1, latency) == float('inf')


@pytest.mark.slow
def test_steps_of_several_processes(tmp_path):
    done = bench('speed/processes.py', '--quick', '--out', tmp_path)
    assert done.returncode == 0 and '| Net, 2 processes with a core each, 16 images |' in done.stdout, done.stderr
    rows = {(o['what'], o['measure']): o for o in map(json.loads, (tmp_path/'processes.jsonl').read_text().splitlines())}
    assert rows['Net, gradients', 'bytes a step']['median'] == 4*99_912 and len(rows) == 7
    assert rows['all-reduce, 2 processes', 'all-reduce of 8 MiB']['unit'] == 'ms'
    assert {'hardware', 'versions', 'commit', 'command', 'date'} <= rows['Net, 2 hosts, 16 images', 'break-even bandwidth'].keys()


def test_without_data_it_says_so():
    done = bench('speed/epochs.py', S9_CIFAR10='')
    assert done.returncode == 2 and 'S9_CIFAR10' in done.stderr.splitlines()[-1] and done.stdout == ''


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    done = bench('speed/gpu.py')
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('gpu.py: no CUDA on this machine: run it where there is a GPU')
    done = subprocess.run([folder.parent/'tools'/'gpu_check.sh'], capture_output=True, text=True, env={**os.environ, 'PYTHON': sys.executable})
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 1 and 'gpu_check: no CUDA' in done.stdout


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path):
    done = bench('speed/gpu.py', *'--device cpu --quick --seconds 400 --out'.split(), tmp_path)
    assert done.returncode == 0 and 'curves of recipe stated: the largest of 3 differences' in done.stdout and 'left out' in done.stdout, done.stderr
    lines = [json.loads(o) for o in (tmp_path/'gpu.jsonl').read_text().splitlines()]
    assert not [o for o in lines if o['measure'] == 'failed']
    assert {o['settings']['method'] for o in lines if 'method' in o['settings']} == {'stated', 'fast', 'fastai', 'pytorch', 'bare', 'airbench', 'airbench-1024'}


@pytest.mark.slow
def test_runs_from_several_seeds_are_one_line_and_are_resumed(tmp_path):
    args = ['accuracy/accuracy.py', 'try', '--seeds', 0, 1, '--folder', tmp_path/'runs', '--out', tmp_path/'results', '--recipe', 'fast', '--data', 'sample',
            '--n-channels', 4, '--bs', 500, '--held-out', 500]
    for epochs in (1, 1):  # the second time nothing is trained
        done = bench(*args, '--epochs', epochs)
        assert done.returncode == 0 and 'try: ' in done.stdout and 'n = 2' in done.stdout, done.stderr
    lines = [json.loads(o) for o in (tmp_path/'results'/'accuracy.jsonl').read_text().splitlines()]
    assert len(lines) == 2 and lines[0]['values'] == lines[1]['values'] and lines[0]['seconds'] == lines[1]['seconds']
    o = lines[0]
    assert o['n'] == 2 and o['seeds'] == [0, 1] and o['failed'] == {} and o['recipe']['opt'] == 'muon' and o['epochs'] == 1
    assert 'held-out' in o['measure'] and len(o['mirrored']) == 2 and all(v*5 == round(v*5) and abs(v - w) < 15 for v, w in zip(o['mirrored'], o['values']))
    assert abs(o['mean'] - sum(o['values'])/2) < 1e-9 and {*o['histories']} == {'0', '1'} and len(o['histories']['0']['train_loss']) == 1
    assert {'hardware', 'versions', 'commit', 'command', 'date'} <= o.keys()
    assert json.loads((tmp_path/'runs'/'try'/'commits.json').read_text()) == {'0': o['commit'], '1': o['commit']}
    done = bench(*args, '--epochs', 2)  # another training under the same name
    assert done.returncode == 2 and 'epochs is 2, but 1 in the sweep in' in done.stderr and 'a result of another name' in done.stderr


def test_an_option_that_cannot_be_used_is_named(tmp_path):
    args = ['accuracy/accuracy.py', 'bad', '--seeds', 0, '--folder', tmp_path/'runs', '--out', tmp_path/'results', '--data', 'sample', '--bs', 'x']
    done = bench(*args)
    assert done.returncode == 2 and "'x' is not a whole number" in done.stderr and not (tmp_path/'results').exists()


@pytest.mark.slow
def test_the_recipe_of_the_sample_and_its_variants(tmp_path):
    args = ['accuracy/sample.py', '--seeds', 0, '--epochs', 1, '--threads', 1, '--out', tmp_path]
    done = bench(*args, 'as it is', 'rate 0.2')
    assert done.returncode == 0 and 'rate 0.2: ' in done.stdout, done.stderr
    lines = [json.loads(o) for o in (tmp_path/'sample.jsonl').read_text().splitlines()]
    assert [(o['what'], o['seed'], o['recipe']['held_out'], o['recipe']['epochs']) for o in lines] == [('as it is', 0, 500, 1), ('rate 0.2', 0, 500, 1)]
    assert all('held-out' in o['measure'] and o['steps'] == -(-1500//o['recipe']['bs']) and o['seconds'] > 0 for o in lines)
    assert lines[0]['recipe'] | {'lr': 0.2} == lines[1]['recipe'] and {'hardware', 'versions', 'commit', 'command', 'date'} <= lines[0].keys()
    done = bench(*args, 'rate 7')
    assert done.returncode == 2 and "no variant 'rate 7'" in done.stderr


@pytest.mark.slow
def test_a_teacher_is_trained_and_ablations_use_it(tmp_path):
    common = ['--data', 'sample', '--epochs', 1, '--held-out', 500, '--threads', 1, '--out', tmp_path]
    done = bench('accuracy/teacher.py', *common, '--width', 4, '--keep', tmp_path/'t.safetensors')
    assert done.returncode == 0 and '% of the held-out images' in done.stdout, done.stderr
    done = bench('accuracy/teacher.py', *common, '--held-out', 0)
    assert done.returncode == 2 and '--held-out is 0' in done.stderr
    done = bench('accuracy/ablate.py', 'a teacher, weight 0.9', *common, '--held-out', 100, '--teacher', tmp_path/'t.safetensors')
    assert done.returncode == 1 and 'it has seen images that are held out now' in done.stderr
    for _ in range(2):  # the second time nothing is left to do
        done = bench('accuracy/ablate.py', 'as it is', 'mixup 0.2', 'a teacher, weight 0.9', *common, '--teacher', tmp_path/'t.safetensors')
        assert done.returncode == 0, done.stderr
    lines = [json.loads(o) for o in (tmp_path/'ablate.jsonl').read_text().splitlines()]
    assert [o['what'] for o in lines] == ['as it is', 'mixup 0.2', 'a teacher, weight 0.9'] and done.stdout == ''
    assert [o['seed'] for o in lines] == [0, 0, 0] and [('teacher' in o) for o in lines] == [False, False, True]
    assert [bool(o['callbacks']) for o in lines] == [False, True, True] and 'weight=0.9' in lines[2]['callbacks'][0] and len({o['history']['train_loss'][0] for o in lines}) == 3
