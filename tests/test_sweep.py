"A sweep: claims, processes, results. Most tests train nothing: a script in the place of s9_train writes the files of a run"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from processes import bin, run

from s9_fastai.app.command import BadInput
from s9_fastai.app.grid import SweepRun, parse_axis, parse_seeds
from s9_fastai.app.job import TRAIN, Job, failure, is_done, is_training
from s9_fastai.app.queue import JobList, Queue, run_queue
from s9_fastai.app.scores import config_results, run_result
from s9_fastai.report.intervals import mean_interval

SWEEP = (sys.executable, '-c', 'import sys; from s9_fastai.app.entry import sweep; sweep()')
STUB = r"""
import os, signal, sys, time
from pathlib import Path
from filelock import FileLock
option = dict(o.lstrip('-').partition('=')[::2] for o in sys.argv[3:])
path, how = Path(sys.argv[2]), os.environ.get('HOW', '')
(path/'checkpoints').mkdir(exist_ok=True)
lock = FileLock(path/'checkpoints'/'lock')
lock.acquire(timeout=0)
with open(path/'begun', 'a') as f: print(sys.argv[1], file=f)
(path/'recipe.json').write_text('{"epochs": 5}')
def stop(*_): raise SystemExit(143)
signal.signal(signal.SIGTERM, stop)
if how == 'fail' and path.name == 'seed=1': sys.exit('s9_train: the loss is nan')
history = path/'history.csv'
if not history.exists(): history.write_text('epoch,valid_accuracy,time\n')
for i in range(len(history.read_text().splitlines()), 6):
    time.sleep(float(os.environ.get('PAUSE', 0.02)))
    with open(history, 'a') as f: f.write(f'{i},0.{i}{path.name[-1]},00:01\n')
    if how == 'kill' and i == 3 and path.name == 'seed=1': os.kill(os.getpid(), 9)
(path/'weights.safetensors').touch()
"""
QUEUE = f"""
import sys
from pathlib import Path
from s9_fastai.app.grid import SweepRun
from s9_fastai.app.job import Job
from s9_fastai.app.queue import JobList, Queue, run_queue
folder, n, at_once = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
jobs = [Job(SweepRun(f'seed={{i}}', {{}}, i), folder/f'seed={{i}}', [f'--seed={{i}}']) for i in range(n)]
queue = Queue(JobList(jobs), at_once, command=(sys.executable, '-c', {STUB!r}))
queue.pause = 0.01
print('signal', run_queue(queue))
"""


def jobs_in(folder, n): return [Job(SweepRun(f'seed={i}', {}, i), folder/f'seed={i}', [f'--seed={i}']) for i in range(n)]
def begun(folder, i): return (folder/f'seed={i}'/'begun').read_text().split()


def start(folder, n=3, at_once=1, **env):
    "A process that works on the queue in `folder`"
    return subprocess.Popen([sys.executable, '-c', QUEUE, str(folder), str(n), str(at_once)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env})


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'it has not come'
        time.sleep(0.02)


def test_two_processes_never_do_a_run_twice(tmp_path):
    procs = [start(tmp_path, 12, 2) for _ in range(2)]
    outs = [p.communicate(timeout=120)[0] for p in procs]
    assert [p.returncode for p in procs] == [0, 0], outs
    assert [begun(tmp_path, i) for i in range(12)] == [['--out']]*12 and all(is_done(tmp_path/f'seed={i}') for i in range(12))
    assert sum(o.count('begun: ') for o in outs) == 12
    again = start(tmp_path, 12, 2).communicate(timeout=60)[0]
    assert again == 'signal None\n'  # nothing is left


def test_a_failed_run_is_reported_and_tried_again_by_the_next_call(tmp_path):
    out = start(tmp_path, HOW='fail').communicate(timeout=60)[0]
    log = tmp_path/'seed=1'/'sweep.log'
    assert f'failed: seed=1: exit code 1: the loss is nan; log: {log}\n' in out and 'done: seed=2: valid_accuracy 0.5200 after epoch 5, 0:05 min\n' in out
    assert 'the loss is nan' in log.read_text() and failure(tmp_path/'seed=1')['error'] == 'exit code 1: the loss is nan'
    assert run_result(jobs_in(tmp_path, 2)[1]).state == 'failed'
    out = start(tmp_path).communicate(timeout=60)[0]
    assert 'resumed: seed=1, after epoch 0' in out and failure(tmp_path/'seed=1') is None
    assert [begun(tmp_path, i) for i in range(3)] == [['--out'], ['--out', '--resume'], ['--out']]


def test_a_failure_elsewhere_is_not_repeated_in_the_same_call(tmp_path):
    source = JobList(jobs_in(tmp_path, 2))
    (tmp_path/'seed=0').mkdir()
    (tmp_path/'seed=0'/'sweep.failed').write_text('{"error": "no disk", "time": 1}')
    assert source.next().name == 'seed=1' and [o.state for o in source.jobs] == ['failed', 'waiting'] and source.jobs[0].error == 'no disk'


def test_a_killed_run_is_taken_up_again(tmp_path):
    out = start(tmp_path, HOW='kill').communicate(timeout=60)[0]
    assert 'killed: seed=1: killed by SIGKILL; it is taken up again\nresumed: seed=1, after epoch 3\n' in out
    assert begun(tmp_path, 1) == ['--out', '--resume'] and is_done(tmp_path/'seed=1')
    assert [o.epochs for o in map(run_result, jobs_in(tmp_path, 3))] == [5, 5, 5]


def test_a_killed_sweep_leaves_its_runs_going_and_another_one_passes_them_by(tmp_path):
    p = start(tmp_path, 2, PAUSE='0.5')
    wait_for(lambda: is_training(tmp_path/'seed=0'))
    p.kill()
    p.communicate(timeout=30)
    out = start(tmp_path, 2).communicate(timeout=60)[0]
    assert 'seed=0' not in out and 'done: seed=1' in out
    wait_for(lambda: is_done(tmp_path/'seed=0'))
    assert begun(tmp_path, 0) == ['--out']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_a_later_call_goes_on(tmp_path, number):
    p = start(tmp_path, 3, 2, PAUSE='0.5')
    wait_for(lambda: is_training(tmp_path/'seed=0') and is_training(tmp_path/'seed=1'))
    time.sleep(0.3)  # the stub has its handler
    p.send_signal(number)
    out = p.communicate(timeout=60)[0]
    assert 'stopping: 2 under way' in out and out.count('stopped: ') == 2 and out.endswith(f'signal {int(number)}\n') and not (tmp_path/'seed=2').exists()
    out = start(tmp_path, 3, 2).communicate(timeout=60)[0]
    assert out.count('resumed: ') == 2 and out.count('done: ') == 3


def test_an_error_of_the_loop_leaves_no_process(tmp_path):
    class Broken(JobList):
        def watch(self, job): raise OSError('no disk')
    queue = Queue(Broken(jobs_in(tmp_path, 1)), command=(sys.executable, '-c', 'import time; time.sleep(60)'))
    with pytest.raises(OSError, match='no disk'): run_queue(queue)
    assert queue.source.jobs[0].process.returncode == -signal.SIGTERM


@pytest.mark.parametrize('n', [2, 3, 10])
def test_the_table_is_that_of_numpy_and_scipy(tmp_path, n):
    rng = np.random.default_rng(n)
    values = rng.normal(0.8, 0.02, n)
    found = mean_interval(values)
    assert (found.mean, found.std) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert (found.low, found.high) == pytest.approx(scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values)))
    for job, v in zip(jobs_in(tmp_path, n), values):
        job.path.mkdir()
        (job.path/'recipe.json').write_text('{"epochs": 1}'), (job.path/'weights.safetensors').touch()
        (job.path/'history.csv').write_text(f'epoch,valid_accuracy,time\n1,{v},00:02\n')
    config, = config_results(map(run_result, jobs_in(tmp_path, n)))
    assert config[3:8] == found and config.best == values.max() and config.best_run == f'seed={values.argmax()}' and config.seconds == 2


@pytest.mark.parametrize('text', ['', 'a', '1-', '-1', '1,,2', '1-2-3', '99999999999', '0-99999'])
def test_wrong_seeds(text):
    with pytest.raises(BadInput, match='seeds is'): parse_seeds(text)


@pytest.mark.parametrize('text', ['lr', '=1', 'lr=', 'lr=a', 'lr=1,', 'lrate=1', 'seed=1', 'out=a', 'skip_bad=1', 'lr=1..0', 'lr=0..1:log', 'epochs=1.5', 'lr=nan..1'])
def test_wrong_axes(text):
    with pytest.raises(BadInput): parse_axis(text)


def test_wrong_command_lines_end_in_one_line(tmp_path):
    for args, msg in ((['--grid', 'lrr=1'], 'did you mean lr?'), (['--lrr', '1'], 'unrecognized arguments: --lrr 1; did you mean --lr?'), ([], 'no runs: give --seeds'),
                      (['--seeds', '0', '--jobs', '0'], 'jobs is 0, but must be 1 to 256'), (['--grid=--'], 'argument --grid: expected one argument')):
        done = run(bin/'s9_sweep', *args, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, '') and msg in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert not [*tmp_path.iterdir()]


def test_modules_in_the_present_folder_are_not_imported(tmp_path):
    (tmp_path/'torch.py').write_text('raise SystemExit("wrong torch")')
    assert subprocess.run([*TRAIN, '--version'], capture_output=True, text=True, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_four_seeds_on_the_sample_killed_and_taken_up_again(tmp_path):
    "The real command: one run is killed, then the sweep is stopped; in the end the weights are those of runs that were left alone"
    args = ['--data', 'sample', '--epochs', '2', '--n-channels', '4', '--bs', '250', '--device', 'cpu']
    def sweep(*more): return subprocess.Popen([*SWEEP, '--out', 'sweep', *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    runs = tmp_path/'sweep'/'runs'
    p = sweep(*args, '--seeds', '0-3', '--jobs', '2')
    wait_for(lambda: (runs/'seed=1'/'history.csv').exists(), 200)
    children = Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()
    child = next(c for c in children if 'seed=1' in Path(f'/proc/{c}/cmdline').read_text())
    os.kill(int(child), signal.SIGKILL)
    wait_for(lambda: ' resumed' in (runs/'seed=1'/'sweep.log').read_text(), 200)
    p.send_signal(signal.SIGTERM)
    out = p.communicate(timeout=200)[0]
    assert p.returncode == 143 and 'killed: seed=1: killed by SIGKILL' in out and 's9_sweep: stopped, with ' in out and out.endswith('to go on: s9_sweep --out sweep --jobs 2\n')
    p = sweep('--jobs', '2')
    out = p.communicate(timeout=400)[0]
    assert p.returncode == 0 and 'resumed: seed=1' in out and 'valid_accuracy on the test images' in out, out
    assert len((tmp_path/'sweep'/'results.jsonl').read_text().splitlines()) == 4
    subprocess.run([*TRAIN, *args, '--seed', '1', '--out', 'alone'], cwd=tmp_path, check=True, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert (tmp_path/'alone'/'weights.safetensors').read_bytes() == (runs/'seed=1'/'weights.safetensors').read_bytes()
    p = sweep('--json')
    rows = [json.loads(ln) for ln in p.communicate(timeout=100)[0].splitlines() if ln.startswith('{')]
    assert [o['n'] for o in rows] == [4] and 'begun' not in out.split('valid_accuracy on the test')[1]
