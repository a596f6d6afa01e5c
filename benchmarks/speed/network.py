"Milliseconds a step of the network alone: forward, loss, backward, optimizer, with a batch that is already there"
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import options, parse, save, show
from methods import bare_epoch, bare_sgd, fast_net, fixed_batch
from rounds import Method, interleave, lines_of
from s9_fastai.training.fast import keep_freed_memory
from s9_fastai.nets.net import Net

CHANNELS_LAST, BF16, F32 = torch.channels_last, torch.bfloat16, torch.float32
TODAY = 'stock layers, channels last, bfloat16'
# name: layers, memory format, dtype
VARIANTS = {'stock layers, float32': ('stock', torch.contiguous_format, F32),
            'stock layers, channels last, float32': ('stock', CHANNELS_LAST, F32),
            TODAY: ('stock', CHANNELS_LAST, BF16),
            'fast layers, float32': ('fast', CHANNELS_LAST, F32),
            'fast layers, bfloat16': ('fast', CHANNELS_LAST, BF16)}


def make_block(variant, dropout, bs, steps, compiled):
    "A function that runs a block of steps of `variant`: milliseconds a step"
    layers, memory_format, dtype = VARIANTS[variant]
    torch.manual_seed(0)
    if layers == 'fast': keep_freed_memory()
    net = fast_net(dropout) if layers == 'fast' else Net(dropout=dropout).to(memory_format=memory_format)
    model = torch.compile(net.train()) if compiled else net.train()
    block = partial(bare_epoch, model, bare_sgd(net), *fixed_batch(bs, memory_format), steps, dtype)

    def run():
        start = perf_counter()
        block()
        return {'one step': 1e3*(perf_counter() - start)/steps}
    return run


def main():
    p = options(__doc__, repeats=5)
    p.add_argument('--bs', type=int, default=128, help='images a batch')
    p.add_argument('--steps', type=int, default=20, help='steps in a block, which is one repetition')
    p.add_argument('--dropout', type=float, nargs='+', default=[0.1, 0.], metavar='P', help='dropout of the Net')
    p.add_argument('--compile', action='store_true', help='torch.compile every variant')
    args = parse(p)
    for dropout in args.dropout:
        settings = dict(bs=args.bs, dropout=dropout, steps=args.steps, compile=args.compile)
        how = dict(dropout=dropout, bs=args.bs, steps=args.steps, compiled=args.compile)
        group = [Method(v, make_block, dict(variant=v, **how), settings, args.threads) for v in VARIANTS]
        interleave(group, args.repeats)
        lines = lines_of(group, {'one step': 'ms'})
        save(lines, args.out)
        print(f'\nbatches of {args.bs}, dropout {dropout:g}')
        show(lines, TODAY)


if __name__ == '__main__': main()
