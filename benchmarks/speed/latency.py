"Milliseconds to classify a batch with an exported network: torch, ONNX in floats and in 8 bits, by batch size"
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_line, options, parse, save, show, versions
from s9_fastai.app.deploy import open_exportable
from s9_fastai.nets.export import DeployNet, quantize, write_onnx

BATCHES = 1, 8, 64


def by_torch(o):
    "A function of images to probabilities, in torch's default format and float32"
    model = DeployNet(o.net, o.spec).eval()

    def run(images):
        with torch.inference_mode(): return model(torch.from_numpy(images))[0].numpy()
    return run


def by_onnx(path, threads):
    "The same, by onnxruntime with as many threads as torch"
    opts = onnxruntime.SessionOptions()
    opts.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, opts, providers=['CPUExecutionProvider'])
    return lambda images: session.run(['probabilities'], {'images': images})[0]


def milliseconds(run, images, seconds):
    "The time of one batch, the mean of as many as take about `seconds`"
    start, n = perf_counter(), 0
    while (spent := perf_counter() - start) < seconds or not n:
        run(images)
        n += 1
    return 1e3*spent/n


def measured(methods, images, seconds, repeats):
    "Times by method, interleaved; the first round is a warm-up"
    found = {nm: [] for nm in methods}
    for _ in range(repeats + 1):
        for nm, run in methods.items(): found[nm].append(milliseconds(run, images, seconds))
    return {nm: v[1:] for nm, v in found.items()}


def main():
    p = options(__doc__, repeats=5)
    p.add_argument('--model', default='pretrained', help="run folder or weights file; 'pretrained': the weights in the package")
    p.add_argument('--batches', type=int, nargs='+', default=BATCHES, help='images a batch')
    p.add_argument('--seconds', type=float, default=1., help='length of one repetition of one method')
    args = parse(p)
    o, rng = open_exportable(args.model), np.random.default_rng(0)
    shape = o.spec.size, o.spec.size, len(o.spec.mean)
    def draw(n): return rng.integers(256, size=(n, *shape), dtype=np.uint8)  # the time does not depend on the pixels
    with TemporaryDirectory() as tmp:
        write_onnx(o.net, o.spec, f'{tmp}/float.onnx')
        quantize(f'{tmp}/float.onnx', f'{tmp}/int8.onnx', draw(100))
        methods = {'torch': by_torch(o), **{nm: by_onnx(f'{tmp}/{file}.onnx', args.threads) for nm, file in (('ONNX', 'float'), ('ONNX, 8 bits', 'int8'))}}
        for bs in args.batches:
            found = measured(methods, draw(bs), args.seconds, args.repeats)
            settings = dict(model=o.name, bs=bs, size=o.spec.size, seconds=args.seconds, **versions('onnx', 'onnxruntime'))
            lines = [make_line(nm, f'a batch of {bs}', 'ms', v, settings) for nm, v in found.items()]
            save(lines, args.out)
            show(lines, 'torch')


if __name__ == '__main__': main()
