"Two hosts on one machine: network namespaces of Linux with a link between them, which can be slow, late or cut; for the right to make them, be root"
import ctypes
import fcntl
import os
import struct
import subprocess
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from select import select
from threading import Event, Thread

CLONE_NEWNET = 0x40000000  # of sched.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454ca, 1, 0x1000  # of if_tun.h
PACKET = 32_000  # bytes of a packet on a late link: few, as Python carries them
ADDRESSES = '10.77.0.1', '10.77.0.2'


def ip(*args):
    "Run a command of iproute2; an OSError with its words where it fails"
    try: done = subprocess.run([*map(str, args)], capture_output=True, text=True)
    except FileNotFoundError as e: raise OSError(f'two hosts need {args[0]} of iproute2') from e
    if done.returncode: raise OSError(f'{" ".join(map(str, args))}: {done.stderr.strip()}')


class LateLink:
    "Two TUN devices called `names`; a thread carries the packets of each to the other, `delay` ms late"
    def __init__(self, names, delay):
        self.names, self.delay, self.over, self.ends, self.waiting, self.thread = names, delay/1e3, Event(), [], deque(), None

    def make(self):
        "The devices, in this network namespace"
        for nm in self.names:
            self.ends.append(os.open('/dev/net/tun', os.O_RDWR))
            fcntl.ioctl(self.ends[-1], TUNSETIFF, struct.pack('16sH22x', nm.encode(), IFF_TUN | IFF_NO_PI))
            ip('ip', 'link', 'set', nm, 'mtu', PACKET)
        self.thread = Thread(target=self.carry, daemon=True)
        self.thread.start()

    def carry(self):
        a, b = self.ends
        while not self.over.is_set():
            wait = self.waiting[0][0] - time.monotonic() if self.waiting else 0.1
            for end in select(self.ends, [], [], max(0, wait))[0]:
                self.waiting.append((time.monotonic() + self.delay, b if end == a else a, os.read(end, 2*PACKET)))
            self.deliver()

    def deliver(self):
        "Write the packets that are due"
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            _, end, packet = self.waiting.popleft()
            with suppress(OSError): os.write(end, packet)  # an end that is down loses it

    def close(self):
        self.over.set()
        if self.thread: self.thread.join()
        for end in self.ends: os.close(end)


class Hosts:
    "Two hosts with a link of `rate` Mbit/s (None: as fast as the machine), on which a packet takes `delay` ms more"
    def __init__(self, rate=None, delay=0, number=0):
        self.rate, self.delay = rate, delay
        self.names, self.links = ([f'{o}{os.getpid()}-{number}{i}' for i in 'ab'] for o in ('s9-', 's9v'))  # the second at most 15 characters
        self.late = LateLink(self.links, delay) if delay else None

    def __getstate__(self): return {**vars(self), 'late': None}  # a process of a host needs names only

    def __enter__(self):
        try: self.make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.late: self.late.close()
        for nm in self.names:
            if Path('/var/run/netns', nm).exists(): ip('ip', 'netns', 'del', nm)

    def make(self):
        for nm in self.names:
            ip('ip', 'netns', 'add', nm)
            ip('ip', '-n', nm, 'link', 'set', 'lo', 'up')
        self.connect()
        for nm, link, address in zip(self.names, self.links, ADDRESSES):
            ip('ip', '-n', nm, 'addr', 'add', f'{address}/24', 'dev', link)
            ip('ip', '-n', nm, 'link', 'set', link, 'up')
            if self.rate: ip('tc', '-n', nm, 'qdisc', 'add', 'dev', link, 'root', 'tbf', 'rate', f'{self.rate}mbit', 'burst', '64kb', 'latency', '500ms')

    def connect(self):
        "One end of the link in each host"
        (a, b), (v, w) = self.names, self.links
        if not self.late: return ip('ip', 'link', 'add', v, 'netns', a, 'type', 'veth', 'peer', 'name', w, 'netns', b)
        self.late.make()
        for nm, link in zip(self.names, self.links): ip('ip', 'link', 'set', link, 'netns', nm)

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
