"Two hosts train together: two network namespaces with a link between them, which is cut"
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from launchers import Launch, as_script, same_weights, tiny, torchrun, train

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'/'speed'))
from hosts import ADDRESSES, Hosts

watched = train.with_name('watched.py')
PORT = 29500  # nothing else listens in a new namespace


@contextmanager
def both(hosts, folder, *args):
    "torchrun on both hosts, with the address of the first; `args` by host"
    with launch(hosts, 0, folder, *args[0]) as a, launch(hosts, 1, folder, *args[1]) as b: yield a, b


def launch(hosts, i, folder, *args):
    "torchrun with `args` on host `i`"
    return Launch(folder/str(i), *args, prefix=hosts.command(i), GLOO_SOCKET_IFNAME=hosts.links[i], OMP_NUM_THREADS='1')


def first(*args):
    "The arguments of torchrun for a new run, by host"
    return [('--nnodes', 2, '--node-rank', i, '--nproc-per-node', 1, '--master-addr', ADDRESSES[0], '--master-port', PORT, *args) for i in (0, 1)]


@contextmanager
def linked(delay=0):
    "Two hosts with a link"
    with ExitStack() as stack:
        try: found = stack.enter_context(Hosts(delay=delay))
        except OSError as e: pytest.skip(f'two hosts need the right to make network namespaces: {e}')
        yield found


@pytest.fixture
def hosts():
    if not torchrun.exists(): pytest.skip('there is no torchrun')
    with linked() as found: yield found


# sends a byte back, and takes the time of one that is sent there
echo = f"""
import socket
with socket.create_server(('{ADDRESSES[1]}', {PORT})) as s:
    print('ready', flush=True)
    with s.accept()[0] as c: c.sendall(c.recv(1))
"""
ask = f"""
import socket, time
with socket.create_connection(('{ADDRESSES[1]}', {PORT})) as c:
    begun = time.monotonic()
    c.sendall(b'a')
    c.recv(1)
    print(time.monotonic() - begun)
"""


@pytest.mark.parametrize('delay', [0, 50])
def test_a_packet_is_as_late_as_its_link(delay):
    with linked(delay) as hosts, subprocess.Popen([*hosts.command(1), sys.executable, '-c', echo], stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline() == 'ready\n'
        took = subprocess.run([*hosts.command(0), sys.executable, '-c', ask], capture_output=True, text=True, timeout=60).stdout
    assert 2*delay <= 1000*float(took) < 2*delay + 50


def cut(hosts, a, b):
    "Both end soon after the link is cut, and each names what it misses in one line, with its own command"
    hosts.cut()
    assert [a.end(60), b.end(60)] == [1, 1]
    lines = [*a.lines(), *b.lines()]
    assert len(lines) == 2, a.text + b.text
    assert 'rank 1 of 2 is gone, without a sign for ' in lines[0] and 'the host of rank 0, 10.77.0.1, cannot be reached for ' in lines[1]
    return lines


def test_a_cut_link_ends_both_sides(hosts, tmp_path):
    with both(hosts, tmp_path, *first(watched, 60)) as (a, b):
        a.wait_for('adding')
        lines = cut(hosts, a, b)
    assert all(o.endswith('; nothing that was saved is lost: s9_train --resume run') for o in lines)
    assert max(a.took, b.took) < 20


@pytest.mark.slow
def test_a_run_on_two_hosts_goes_on_after_a_cut(hosts, tmp_path):
    options = [train, *tiny, '--epochs', 5, '--save-every', 3, '--out']
    with both(hosts, tmp_path/'a', *first(*options, tmp_path/'reference')) as (a, b): assert [a.end(), b.end()] == [0, 0], a.text + b.text
    with both(hosts, tmp_path/'b', *first(*options, tmp_path/'run')) as (a, b):
        a.wait_for('epoch   2')
        cut(hosts, a, b)
    commands = [o.command() for o in (a, b)]
    assert [o[o.index('--node-rank') + 1] for o in commands] == ['0', '1'] and all(o[-2:] == ['--resume', str(tmp_path/'run')] for o in commands)
    hosts.join()
    with both(hosts, tmp_path/'c', *map(as_script, commands)) as (a, b): assert [a.end(), b.end()] == [0, 0], a.text + b.text
    assert 'resuming from' in a.text and same_weights(tmp_path/'run', tmp_path/'reference')


@pytest.mark.slow
@pytest.mark.parametrize('how', ['static', 'c10d'])
def test_both_hosts_start_again_where_a_process_is_killed(hosts, tmp_path, how):
    options = [train, *tiny, '--epochs', 5, '--save-every', 3, '--out']
    with both(hosts, tmp_path/'a', *first(*options, tmp_path/'reference')) as (a, b): assert [a.end(), b.end()] == [0, 0], a.text + b.text
    args = first('--max-restarts', 1, *options, tmp_path/'run')
    if how == 'c10d':  # a host knows its address by its name elsewhere
        point = ['--nnodes', 2, '--nproc-per-node', 1, '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'{ADDRESSES[0]}:{PORT}', '--max-restarts', 1]
        args = [(*point, '--local-addr', ADDRESSES[i], '--rdzv-conf', f'is_host={1 - i}', *options, tmp_path/'run') for i in (0, 1)]
    with both(hosts, tmp_path/'b', *args) as (a, b):
        while not any('epoch   2' in o.text for o in (a, b)):
            assert a.p.poll() is None and b.p.poll() is None, a.text + b.text
            time.sleep(0.02)
        second = b if 'epoch   2' in a.text else a  # the hosts of c10d are numbered as they come
        os.kill(second.pid(1), signal.SIGKILL)
        assert [a.end(), b.end()] == [0, 0], a.text + b.text
    assert len([*a.lines(), *b.lines()]) == 1 and f'{tmp_path}/run: resuming from ' in a.text + b.text
    assert same_weights(tmp_path/'run', tmp_path/'reference')
