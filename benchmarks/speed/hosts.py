"Two hosts on one machine: network namespaces of Linux with a link between them, which can be slow, late or cut; for the right to make them, be root"
import ctypes
import os
import subprocess
from pathlib import Path

CLONE_NEWNET = 0x40000000  # of sched.h
ADDRESSES = '10.77.0.1', '10.77.0.2'


def ip(*args):
    "Run a command of iproute2; an OSError with its words where it fails"
    try: done = subprocess.run([*map(str, args)], capture_output=True, text=True)
    except FileNotFoundError as e: raise OSError(f'two hosts need {args[0]} of iproute2') from e
    if done.returncode: raise OSError(f'{" ".join(map(str, args))}: {done.stderr.strip()}')


class Hosts:
    "Two hosts with a link of `rate` Mbit/s (None: as fast as the machine), on which a packet takes `delay` ms more"
    def __init__(self, rate=None, delay=0, number=0):
        self.rate, self.delay = rate, delay
        self.names, self.links = ([f'{o}{os.getpid()}-{number}{i}' for i in 'ab'] for o in ('s9-', 's9v'))  # the second at most 15 characters

    def __enter__(self):
        try: self.make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for nm in self.names:
            if Path('/var/run/netns', nm).exists(): ip('ip', 'netns', 'del', nm)

    def make(self):
        for nm in self.names:
            ip('ip', 'netns', 'add', nm)
            ip('ip', '-n', nm, 'link', 'set', 'lo', 'up')
        (a, b), (v, w) = self.names, self.links
        ip('ip', 'link', 'add', v, 'netns', a, 'type', 'veth', 'peer', 'name', w, 'netns', b)
        for nm, link, address in zip(self.names, self.links, ADDRESSES):
            ip('ip', '-n', nm, 'addr', 'add', f'{address}/24', 'dev', link)
            ip('ip', '-n', nm, 'link', 'set', link, 'up')
            self.slow(nm, link)

    def slow(self, nm, link):
        "Give one end of the link its rate and delay"
        rate = ('rate', f'{self.rate}mbit') if self.rate else ()
        if self.delay: ip('tc', '-n', nm, 'qdisc', 'add', 'dev', link, 'root', 'netem', 'delay', f'{self.delay}ms', *rate)
        elif rate: ip('tc', '-n', nm, 'qdisc', 'add', 'dev', link, 'root', 'tbf', *rate, 'burst', '64kb', 'latency', '500ms')

    def cut(self): ip('ip', '-n', self.names[1], 'link', 'set', self.links[1], 'down')

    def join(self): ip('ip', '-n', self.names[1], 'link', 'set', self.links[1], 'up')

    def command(self, i): return ['ip', 'netns', 'exec', self.names[i]]


def enter(nm):
    "Move this thread, and those that it starts, to the host `nm`"
    fd = os.open(f'/var/run/netns/{nm}', os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.setns(fd, CLONE_NEWNET)
    os.close(fd)
    if failed: raise OSError(ctypes.get_errno(), 'this process cannot move to another host')
