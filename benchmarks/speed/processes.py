"""Milliseconds a step on one and on several processes, the time of an all-reduce, and the bandwidth from which more processes pay

On paper, a step of N processes takes the time of one process for its part of the batch, and that of the ring all-reduce of the gradients:

    T(N) = C(bs/N) + 2(N-1)/N * bytes/bandwidth + 2(N-1) * latency * buckets

C is measured on one process; bytes are those of all gradients in float32; buckets are those of torch's DistributedDataParallel: the first has 1 MiB, the others 25.
torch overlaps the all-reduce with the backward pass, so this is the upper end. More processes stop to pay where T(N) = C(bs)."""
import multiprocessing
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_line, options, parse, save, show
from hosts import ADDRESSES, Hosts, enter
from rounds import Method, interleave, lines_of
from s9_fastai.nets.net import Net

NETWORKS = {'Net': (Net, 32), 'resnet18': (lambda: resnet18(num_classes=10), 64)}  # and the size of the images
LARGE = 2**23  # bytes of the all-reduce that the bandwidth is taken from

# ---- on paper


def gradient_bytes(net): return sum(p.numel()*p.element_size() for p in net.parameters() if p.requires_grad)


def n_buckets(size): return 1 + max(0, -(-(size - 2**20)//(25*2**20)))


def ring(size, n, bandwidth, latency):
    "Seconds of an all-reduce of `size` bytes among `n` processes: `bandwidth` in bytes a second, `latency` in seconds"
    return 2*(n - 1)/n*size/bandwidth + 2*(n - 1)*latency*n_buckets(size)


def break_even(size, n, whole, part, latency):
    "Bytes a second from which `n` processes are faster than one: `whole` and `part` are seconds of a batch and of its part; infinite: never"
    saved = whole - part - 2*(n - 1)*latency*n_buckets(size)
    return 2*(n - 1)/n*size/saved if saved > 0 else float('inf')


# ---- measured


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def join(rank, n, port, hosts):
    "Begin to train with the other processes, each on its host where there are `hosts`"
    if hosts:
        enter(hosts.names[rank])
        os.environ['GLOO_SOCKET_IFNAME'] = hosts.links[rank]
    address = ADDRESSES[0] if hosts else '127.0.0.1'
    dist.init_process_group('gloo', init_method=f'tcp://{address}:{port}', rank=rank, world_size=n)


def step_block(name, bs, n, steps):
    "A function that trains `steps` batches of `bs//n` images on fixed ones: milliseconds a step"
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    net = make().train()
    model = DistributedDataParallel(net) if n > 1 else net
    opt = torch.optim.SGD(net.parameters(), lr=0.01)
    x, y = torch.randn(bs//n, 3, size, size), torch.arange(bs//n) % 10

    def run():
        start = perf_counter()
        for _ in range(steps):
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        return {'one step': 1e3*(perf_counter() - start)/steps}
    return run


def reduce_block(size, steps):
    "A function that adds up 4 bytes, and `size` bytes, `steps` times: milliseconds of each"
    def timed(n):
        t, start = torch.ones(n), perf_counter()
        for _ in range(steps): dist.all_reduce(t)
        return 1e3*(perf_counter() - start)/steps

    def run(): return {'all-reduce of 4 bytes': timed(1), f'all-reduce of {size/2**20:g} MiB': timed(size//4)}
    return run


def follow(rank, n, port, hosts, threads, make, args):
    "The life of a process that is not the first: a repetition whenever the first one begins one"
    torch.set_num_threads(threads)
    join(rank, n, port, hosts)
    run, go = make(*args), torch.zeros(1)
    while True:
        dist.broadcast(go, 0)
        if not go: return
        run()


def lead(n, hosts, threads, make, args):
    "For `Method`: starts the other processes, and returns a function that runs one repetition of all of them"
    if n == 1: return make(*args)
    port, ctx = free_port(), multiprocessing.get_context('spawn')
    for rank in range(1, n): ctx.Process(target=follow, args=(rank, n, port, hosts, threads, make, args), daemon=True).start()
    join(0, n, port, hosts)
    run = make(*args)

    def repetition():
        dist.broadcast(torch.ones(1), 0)
        return run()
    return repetition


def method(title, n, hosts, threads, make, *args, **settings):
    how = dict(n=n, hosts=hosts, threads=threads, make=make, args=args)
    link = dict(rate=hosts.rate, delay=hosts.delay) if hosts else None
    return Method(title, lead, how, dict(processes=n, link=link, threads_each=threads, **settings), threads)


# ---- rows


def parts_of(args, name):
    "One process with a whole batch and with its parts"
    return [method(f'{name}, 1 process, {args.bs//n} images', 1, None, args.threads, step_block, name, args.bs//n, 1, args.steps, network=name, bs=args.bs//n)
            for n in args.parts]


def several(args, name, hosts):
    "Processes that share this machine or a link"
    made = [(f'{name}, {n} processes with a core each, {args.bs} images', n, None) for n in args.processes]
    made += [(f'{name}, 2 hosts, {linked(h)}, {args.bs} images', 2, h) for h in hosts]
    return [method(title, n, h, 1, step_block, name, args.bs, n, args.steps, network=name, bs=args.bs) for title, n, h in made]


def linked(h): return f'{h.rate or "no"} Mbit/s' + (f', {h.delay} ms' if h.delay else '')


def reductions(args):
    "All-reduce alone, between two processes of this machine"
    return [method('all-reduce, 2 processes', 2, None, 1, reduce_block, LARGE, args.steps)]


def on_paper(args, name, lines, latency):
    "Rows of what follows from the measured steps: bytes, and the bandwidth from which `n` processes pay"
    size = gradient_bytes(NETWORKS[name][0]())
    step = {o['settings']['bs']: o['median']/1e3 for o in lines if o['settings'].get('network') == name and o['settings']['processes'] == 1}
    rows = [make_line(f'{name}, gradients', 'bytes a step', 'bytes', [size], dict(network=name, buckets=n_buckets(size)))]
    for n in args.parts[1:]:
        found = break_even(size, n, step[args.bs], step[args.bs//n], latency)
        rows.append(make_line(f'{name}, {n} hosts, {args.bs} images', 'break-even bandwidth', 'Mbit/s', [8e-6*found], dict(network=name, bs=args.bs, processes=n, latency=latency)))
    return rows


def measure(args, hosts):
    "All rows"
    group = reductions(args)
    for name in args.networks: group += [*parts_of(args, name), *several(args, name, hosts)]
    interleave(group, args.repeats)
    large = f'all-reduce of {LARGE/2**20:g} MiB'
    reduced, steps = lines_of(group, {'all-reduce of 4 bytes': 'ms', large: 'ms'}), lines_of(group, {'one step': 'ms'})
    latency = args.latency*1e-6
    paper = [row for name in args.networks for row in on_paper(args, name, steps, latency)]
    save([*reduced, *steps, *paper], args.out)
    return reduced, steps, paper


def main():
    p = options(__doc__.splitlines()[0], repeats=5)
    p.set_defaults(threads=1)
    p.add_argument('--networks', nargs='+', choices=NETWORKS, default=[*NETWORKS], metavar='NAME', help=f'of: {", ".join(NETWORKS)}')
    p.add_argument('--bs', type=int, default=128, help='images of a whole batch')
    p.add_argument('--parts', type=int, nargs='+', default=[1, 2, 4, 8], metavar='N', help='hosts to compute the break-even bandwidth for; begin with 1')
    p.add_argument('--processes', type=int, nargs='*', default=[2], metavar='N', help='processes that share this machine, with a thread each')
    p.add_argument('--rates', type=int, nargs='*', default=[], metavar='MBIT', help='links between two hosts, in Mbit/s; needs root and tc')
    p.add_argument('--delay', type=int, default=0, metavar='MS', help='milliseconds that a packet takes on such a link, in each direction')
    p.add_argument('--latency', type=float, default=100, metavar='US', help='microseconds of a message in the formula')
    p.add_argument('--steps', type=int, default=10, help='steps in a block, which is one repetition')
    p.add_argument('--quick', action='store_true', help='the Net, 16 images, one repetition of two steps: to try it out')
    args = parse(p)
    if args.quick: args.networks, args.bs, args.parts, args.steps, args.repeats = ['Net'], 16, [1, 2], 2, 1
    if args.parts[0] != 1 or any(args.bs % n for n in [*args.parts, *args.processes]):
        p.error(f'--parts must begin with 1, and all numbers must divide --bs, which is {args.bs}')
    with ExitStack() as stack:
        try: hosts = [stack.enter_context(Hosts(rate, args.delay, i)) for i, rate in enumerate(args.rates)]
        except OSError as e: p.error(f'no link between two hosts: {e}; leave --rates and --delay out')
        reduced, steps, paper = measure(args, hosts)
    for measured in sorted({o['measure'] for o in reduced}): show([o for o in reduced if o['measure'] == measured], '')
    for name in args.networks: show([o for o in steps if o['settings']['network'] == name], '')
    show([o for o in paper if o['unit'] == 'bytes'], '')
    show([o for o in paper if o['unit'] == 'Mbit/s'], '')


if __name__ == '__main__': main()
