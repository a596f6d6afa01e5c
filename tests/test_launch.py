"Trainings on several processes of one host that lose one, or are stopped: they end soon, name the rank and the command, and go on to the same weights"
import os
import re
import signal

import pytest
from filelock import FileLock
from launchers import Launch, as_script, free_port, same_weights, tiny, torchrun, train
from processes import Script

pytestmark = pytest.mark.skipif(os.name != 'posix' or not os.path.isdir('/proc') or not torchrun.exists(), reason='torchrun, signals and /proc')
options = [*tiny, '--epochs', 3, '--save-every', 3]


def launch(folder, *args, **env): return Launch(folder, *args, OMP_NUM_THREADS='1', **env)


def begin(tmp_path, *args):
    "A run on two processes, once it has had an epoch"
    p = launch(tmp_path/'first', *args, '--nproc-per-node', 2, train, *options, '--out', tmp_path/'run')
    try: p.wait_for('epoch   1')
    except BaseException:
        p.__exit__()
        raise
    return p


@pytest.fixture(scope='session')
def reference(tmp_path_factory):
    "The folder of the run that nothing has disturbed, not even a launcher; one for all workers of pytest"
    base = tmp_path_factory.getbasetemp()
    base = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
    with FileLock(base/'reference.lock'):
        if not (base/'reference'/'weights.safetensors').exists():
            env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), WORLD_SIZE='2', OMP_NUM_THREADS='1')
            ranks = [Script(train, *options, '--out', base/'reference', RANK=str(r), LOCAL_RANK=str(r), **env) for r in (0, 1)]
            for done in [p.end() for p in ranks]: assert done.returncode == 0, done.stderr
    return base/'reference'


def resumes(p, tmp_path, reference):
    "Does the printed command finish the run with the weights of the reference?"
    with launch(tmp_path/'second', *as_script(p.command())) as q: assert q.end() == 0, q.text
    assert 'resuming from' in q.text and q.lines() == []
    return same_weights(tmp_path/'run', reference)


def stop(p, rank, signum):
    os.kill(p.pid(rank), signum)
    return p.end(60)


def assert_names(p, rank, tmp_path):
    "One line names the rank that is gone, and the command"
    line, = p.lines()
    assert re.fullmatch(rf's9_train: rank {rank} of 2 is gone, without a sign for \d+ s; nothing that was saved is lost: '
                        rf'torchrun --nproc-per-node 2 -m s9_fastai.train --resume {tmp_path}/run', line), p.text


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_process_ends_the_others_which_name_it(tmp_path, reference, rank):
    with begin(tmp_path) as p:
        assert stop(p, rank, signal.SIGKILL) == 1
        assert_names(p, rank, tmp_path)
    assert resumes(p, tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_stopped_process_ends_the_others_which_name_it(tmp_path, reference, rank):
    with begin(tmp_path) as p:
        assert stop(p, rank, signal.SIGSTOP) == 1
        line, = p.lines()
        assert line.startswith(f'rank {rank} of 2 is gone, without a sign for 2') and line.endswith(f'--resume {tmp_path}/run')
    assert resumes(p, tmp_path, reference)


def signals(p, signum, is_group):
    "As `kill` sends it, to the launcher; or as a terminal does, to the processes too"
    pids = [p.p.pid, *(p.children() if is_group else ())]
    for pid in pids: os.kill(pid, signum)
    return p.end(60)


@pytest.mark.slow
@pytest.mark.parametrize('signum,is_group', [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_signal_saves_once_and_ends(tmp_path, reference, signum, is_group):
    with begin(tmp_path) as p:
        code = signals(p, signum, is_group)
        line, = p.lines()
        assert code == 1 and line.startswith(f's9_train: stopped by {signum.name}, saved in {tmp_path}/run at batch '), p.text
        assert line.endswith(f'torchrun --nproc-per-node 2 -m s9_fastai.train --resume {tmp_path}/run')
    assert resumes(p, tmp_path, reference)


def test_torchrun_restarts_and_goes_on_in_the_same_folder(tmp_path, reference):
    with begin(tmp_path, '--max-restarts', 2) as p:
        os.kill(p.pid(1), signal.SIGKILL)
        assert p.end() == 0, p.text
    assert_names(p, 1, tmp_path)
    assert f'{tmp_path}/run: resuming from ' in p.text and same_weights(tmp_path/'run', reference)
    assert sorted(o.name for o in tmp_path.iterdir()) == ['first', 'run']
