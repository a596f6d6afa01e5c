"Exported files: the same probabilities as torch for any network, used by s9_predict, and by a program without torch and fastai"
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from s9_fastai.app import deploy  # noqa: E402
from s9_fastai.app.command import BadInput, RunFailed  # noqa: E402
from s9_fastai.app.export import main_export, s9_export  # noqa: E402
from s9_fastai.app.images import find_images  # noqa: E402
from s9_fastai.app.learner import s9_learner  # noqa: E402
from s9_fastai.app.parts import loader_parts  # noqa: E402
from s9_fastai.app.predict import main_predict, s9_predict  # noqa: E402
from s9_fastai.app.predictor import Predictor  # noqa: E402
from s9_fastai.app.recipe import get_recipe  # noqa: E402
from s9_fastai.app.train import s9_train  # noqa: E402
from s9_fastai.cifar.loaders import cifar_dls  # noqa: E402
from s9_fastai.core.spec import RESIZE_NAMES, ImageSpec  # noqa: E402
from s9_fastai.nets.build import build_net  # noqa: E402
from s9_fastai.nets.export import write_onnx  # noqa: E402
from s9_fastai.nets.net import WEIGHTS  # noqa: E402
from s9_fastai.nets.onnx import OnnxNet  # noqa: E402
from s9_fastai.nets.saved import save_net  # noqa: E402

root = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings('ignore')


def exportable(n_in=3, n_classes=4, size=32, is_multi=False, resize='crop', **architecture):
    "A random network, its batch norms with statistics of their own"
    torch.manual_seed(0)
    architecture = dict(n_classes=n_classes, n_in=n_in, **architecture)
    net = build_net(**architecture)
    with torch.no_grad(): net.train()(torch.randn(8, n_in, size, size))
    spec = ImageSpec(tuple(f'class {i}' for i in range(n_classes)), size, (0.4,)*n_in, (0.3,)*n_in, resize, is_multi)
    return deploy.Exportable('random', net.eval(), spec, dict(architecture=json.dumps(architecture)))


def pixels(spec, n): return np.random.default_rng(1).integers(256, size=(n, spec.size, spec.size, len(spec.mean)), dtype=np.uint8)


def by_torch(o, x):
    with torch.no_grad(): y = o.net(o.spec.batch(x))
    return (y.sigmoid() if o.spec.is_multi else y.softmax(1)).numpy(), y.numpy()


# --- networks

networks = {
    'group norm, grey, several labels': dict(n_channels=4, norm='gn', n_in=1, is_multi=True, size=48),
    'resnet18': dict(arch='resnet18'), 'a ViT of timm': dict(arch='timm/test_vit', arch_size=32),
    'a network of fastai': dict(arch='xresnet18', n_in=1)}


@pytest.mark.parametrize('what', [pytest.param(o, marks=[pytest.mark.slow]*(o == 'a network of fastai')) for o in networks])
def test_any_network_in_onnx(what, tmp_path):
    kwargs = dict(networks[what])
    if 'timm' in what: pytest.importorskip('timm')
    if size := kwargs.pop('arch_size', None):
        torch.manual_seed(0)
        architecture = dict(arch=kwargs['arch'], n_classes=4, n_in=3, size=size)
        o = deploy.Exportable('vit', build_net(**architecture).eval(), ImageSpec(('a', 'b', 'c', 'd'), size, (0.5,)*3, (0.5,)*3), dict(architecture=json.dumps(architecture)))
    else: o = exportable(**kwargs)
    done = deploy.export_checked(o, tmp_path/'a.onnx', n_random=20)
    assert done.difference < 1e-4 and [f.name for f in tmp_path.iterdir()] == ['a.onnx'] and done.size == (tmp_path/'a.onnx').stat().st_size
    net = OnnxNet(tmp_path/'a.onnx')
    assert net.spec == o.spec
    for n in (1, 3):  # the batch is free
        x = pixels(o.spec, n)
        for a, b in zip(net(x), by_torch(o, x)): np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    model = onnx.load(tmp_path/'a.onnx')
    assert not any(t.data_location for t in model.graph.initializer) and not any(n.metadata_props or n.doc_string for n in model.graph.node)
    assert str(root) not in str(model) and 'class 0' in net.about['classes'] + 'class 0'


@pytest.mark.parametrize('to', ['pt2', 'safetensors'])
def test_other_formats(to, tmp_path):
    o = exportable(n_channels=4, is_multi=True, n_in=1)
    path = tmp_path/f'a.{to}'
    assert deploy.export_checked(o, path, to, n_random=20).difference < 1e-4
    x = pixels(o.spec, 3)
    np.testing.assert_allclose(deploy.FORMATS[to][2](path)(x)[0], by_torch(o, x)[0], atol=1e-4)
    if to == 'safetensors': assert Predictor(weights=path).spec == o.spec


def test_the_fast_layers_of_a_trained_learner_become_plain(tmp_path):
    learn = s9_learner(cifar_dls('sample', policy='flip_crop', augment='batch', device='cpu', bs=250), get_recipe('sample', n_channels=4, epochs=1, bs=250))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    o, parts = deploy.of_learner(learn), loader_parts(learn.dls, learn.dls.source.spec)
    done = deploy.export_checked(o, tmp_path/'a.pt2', 'pt2', parts=parts, n_random=20)
    with learn.no_bar(): p, y = learn.get_preds()
    x = np.concatenate([x for x, _ in parts[1].batches()])
    assert abs(deploy.FORMATS['pt2'][2](tmp_path/'a.pt2')(x)[0] - p.numpy()).max() < 0.05  # fastai's may be in bfloat16
    assert done.accuracies['torch'] == done.accuracies['pt2'] == pytest.approx(float((p.argmax(1) == y).float().mean()), abs=0.01)
    assert type(learn.model.conv1.norm).__name__ == 'FastBatchNorm2d'


@pytest.mark.skipif(tuple(map(int, onnxruntime.__version__.split('.')[:2])) < (1, 32), reason='older versions compute 8 bits less exactly')
def test_eight_bits_are_small_and_near(tmp_path):
    o, dls = deploy.open_exportable('pretrained'), cifar_dls('sample', policy='none', device='cpu')
    done = deploy.export_checked(o, tmp_path/'a.onnx', int8=True, parts=loader_parts(dls, o.spec, n_train=300), n_random=20)
    assert done.size < 150_000 and abs(done.accuracies['int8'] - done.accuracies['torch']) <= 0.01 and done.accuracies['onnx'] == done.accuracies['torch']
    model = onnx.load(tmp_path/'a.onnx')
    scales = {n.input[1] for n in model.graph.node if n.op_type == 'DequantizeLinear'}
    assert max(len(onnx.numpy_helper.to_array(t).shape) for t in model.graph.initializer if t.name in scales) == 1, 'a scale for each channel'
    assert OnnxNet(tmp_path/'a.onnx').about['model_card'].startswith('# Model card')


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('S9_CIFAR10'), reason='S9_CIFAR10 does not name the full CIFAR-10')
def test_eight_bits_lose_at_most_a_third_of_a_point(tmp_path):
    "On all 10,000 test images of CIFAR-10"
    o = deploy.open_exportable('pretrained')
    done = deploy.export_checked(o, tmp_path/'a.onnx', int8=True, parts=loader_parts(o.splits(None), o.spec))
    assert done.n_valid == 10_000 and done.accuracies['torch'] == done.accuracies['onnx'] and done.accuracies['int8'] > done.accuracies['torch'] - 0.003
    assert done.size < 150_000


# --- the command

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A run on a folder of images, with its file in ONNX"
    tmp = tmp_path_factory.mktemp('export')
    for i in range(40):
        (tmp/'images'/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(100 + 50*(i % 2), size=(40 + i, 60, 3), dtype=np.uint8)).save(tmp/'images'/'ab'[i % 2]/f'{i}.png')
    before = os.environ.get('FASTAI_HOME')
    os.environ['FASTAI_HOME'] = str(tmp/'home')
    with redirect_stdout(StringIO()): s9_train(tmp/'images', n_channels=4, size=24, epochs=1, bs=8, policy='none', channels=1, resize='letterbox', out=tmp/'run')
    out = StringIO()
    with redirect_stdout(out): s9_export(tmp/'run', out=tmp/'a.onnx')
    yield tmp, out.getvalue()
    os.environ.pop('FASTAI_HOME')
    if before: os.environ['FASTAI_HOME'] = before


def test_a_run_is_compared_on_its_validation_images(folder):
    tmp, out = folder
    first, second, third = out.splitlines()
    assert first.startswith(f'{tmp}/a.onnx: ') and second.endswith('on 1,000 random images and 8 validation images')
    found = re.fullmatch(r'accuracy on 8 images: torch (\S+)%, onnx (\S+)%', third)
    assert found and found[1] == found[2]
    about = OnnxNet(tmp/'a.onnx').about
    assert '# run\n' in about['model_card'] and f'Accuracy: {found[1]}% of 8 validation images' in about['model_card']
    assert about['resize_rule'].startswith('the whole image with black borders, 24x24 pixels in grey') and json.loads(about['recipe'])['size'] == 24


def test_a_run_whose_images_are_gone(folder, tmp_path, capsys):
    tmp, _ = folder
    shutil.copytree(tmp/'run', tmp_path/'run')
    (tmp_path/'run'/'checkpoints'/'data.json').write_text('"/nowhere"')
    s9_export(tmp_path/'run', out=tmp_path/'a.pt2', to='pt2')
    assert "without validation images (the run's images were at /nowhere" in capsys.readouterr().out
    with pytest.raises(BadInput, match='name the images of this network with --data'): s9_export(tmp_path/'run', out=tmp_path/'a.onnx', int8=True)
    with pytest.raises(BadInput, match='size is 24, but the images are those of CIFAR-10.*leave it out$'): s9_export(tmp_path/'run', out=tmp_path/'a.onnx', data='sample')
    assert not (tmp_path/'a.onnx').exists()


def test_weights_alone_and_a_file_that_stays(folder, tmp_path, capsys, monkeypatch):
    tmp, _ = folder
    monkeypatch.chdir(tmp_path)
    s9_export(tmp/'run'/'weights.safetensors', to='safetensors')
    out = capsys.readouterr().out
    assert out.startswith('weights.safetensors: ') and out.endswith('on 1,000 random images\n')
    before = (tmp_path/'weights.safetensors').read_bytes()
    monkeypatch.setattr(deploy, 'TOLERANCE', -1)
    with pytest.raises(RunFailed, match='nothing is written'): s9_export(tmp/'run'/'weights.safetensors', to='safetensors')
    assert (tmp_path/'weights.safetensors').read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ['weights.safetensors']


def typed(main, monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, 'argv', [main.__name__.replace('main_', 's9_'), *map(str, args)])
    with pytest.raises(SystemExit) as e: main()
    return e.value.code, *capsys.readouterr()


@pytest.mark.parametrize('args, msg', [([], 'the following arguments are required: model'), (['nowhere'], 'nowhere: no recipe.json there'), (['pretrained', '--to', 'tflite'], "to is 'tflite'"),
                                       (['pretrained', '--int8', '--to', 'pt2'], 'int8 is for --to onnx'), (['pretrained', '--out', 'a.pt2'], 'must end with .onnx'),
                                       (['pretrained', '--out', 'no/a.onnx'], 'in a folder that does not exist'), (['pretrained', '--data', 'nowhere'], 'nowhere: no such file or folder'),
                                       ([root/'README.md'], 'not a safetensors file, or a damaged one')])
def test_bad_options_are_one_line(args, msg, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = typed(main_export, monkeypatch, capsys, *args)
    assert code == 2 and msg in err and err.count('\n') == 1 and err.startswith('s9_export: ') and out == '' and not [*tmp_path.iterdir()]


@pytest.mark.parametrize('library', ['onnx', 'onnxruntime', 'onnxscript'])
def test_without_the_libraries(library, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path)
    remedy = f"{library} is not installed: pip install 's9_fastai[onnx]'"
    code, out, err = typed(main_export, monkeypatch, capsys, 'pretrained', '--data', 'sample')
    assert code == 2 and remedy in err and err.count('\n') == 1 and out == ''
    if library == 'onnxscript': return
    code, out, err = typed(main_predict, monkeypatch, capsys, folder[0]/'images', '--onnx', folder[0]/'a.onnx')
    assert code == 2 and remedy in err and err.count('\n') == 1 and out == ''


# --- s9_predict

@pytest.mark.parametrize('tta', [True, False])
def test_a_file_predicts_as_its_run(folder, tta):
    tmp, _ = folder
    files = sorted((tmp/'images').rglob('*.png'))
    for a, b in zip(Predictor(tmp/'run', tta=tta).stream(files), Predictor(onnx=tmp/'a.onnx', tta=tta).stream(files), strict=True):
        assert a[0] == b[0] and a[1].keys() == b[1].keys() == {'a', 'b'} and [*a[1].values()] == pytest.approx([*b[1].values()], abs=1e-4)


def test_several_labels_and_their_mirror_images(tmp_path):
    o = exportable(n_channels=4, is_multi=True)
    save_net(o.net, tmp_path/'a.safetensors', json.loads(o.about['architecture']), o.spec)
    write_onnx(o.net, o.spec, tmp_path/'a.onnx')
    x = pixels(o.spec, 5)
    with torch.no_grad(): want = ((o.net(o.spec.batch(x)) + o.net(o.spec.batch(x[:, :, ::-1].copy())))/2).sigmoid().numpy()
    for kw in (dict(onnx=tmp_path/'a.onnx'), dict(weights=tmp_path/'a.safetensors')):
        np.testing.assert_allclose([[*p.values()] for p in Predictor(**kw).probabilities(list(x))], want, atol=1e-5)


def test_rows_of_odd_files(folder, tmp_path, monkeypatch, capsys):
    "Names are data: formulas, line breaks, quotation marks, brackets and bytes that are not UTF-8"
    names = ['=1+1.png', 'a\nb.png', 'c,"d".png', '[e].png', os.fsdecode(b'\xff.png'), '-.png']
    for nm in names: shutil.copy(folder[0]/'images'/'a'/'0.png', tmp_path/nm)
    (tmp_path/'deep'/'deeper').mkdir(parents=True)
    (tmp_path/'deep'/'f.png').write_text('no image')
    (tmp_path/'deep'/'deeper'/'up').symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    paths = [str(path) for path, _ in find_images(['.'])]
    assert {os.path.basename(o) for o in paths} == {*names, 'f.png', 'up'}
    rows = {}
    for how in ('--json', '--csv'):
        with warnings.catch_warnings():
            warnings.simplefilter('default')
            code, out, err = typed(main_predict, monkeypatch, capsys, '.', how, '--run', folder[0]/'run')
        assert code == 1 and err.count('\n') == 3 and '2 of 8 images could not be read' in err
        rows[how] = [json.loads(o) for o in out.splitlines()] if how == '--json' else list(csv.DictReader(StringIO(out, newline='')))
    assert [o['file'] for o in rows['--json']] == paths
    assert [o['file'] for o in rows['--csv']] == [o.encode(errors='backslashreplace').decode() for o in paths]
    for a, b in zip(rows['--json'], rows['--csv']):
        assert a.get('error', '') == b['error'] and a.get('class', '') == b['class'] and str(a.get('prob', '')) == b['prob']
        if 'top' in a: assert [*a['top']] == [b['class'], b['class_2']] and [*a['top'].values()] == [float(b['prob']), float(b['prob_2'])]
    assert {os.path.basename(o['file']): o['error'][-20:] for o in rows['--json'] if 'error' in o}.keys() == {'f.png', 'up'}
    assert 'a link to a folder above it' in next(o['error'] for o in rows['--csv'] if o['file'].endswith('up'))
    with redirect_stdout(StringIO()) as out: s9_predict('[e].png', '*.png')
    assert len(out.getvalue().splitlines()) == 1 + len(names)


@pytest.mark.parametrize('args, msg', [(['--run', 'RUN', '--onnx', 'ONNX'], 'run and onnx are given, but there is one network: leave one out'), (['--weights', 'WEIGHTS', '--run', 'RUN'], 'run and weights are given'),
                                       (['--json', '--csv'], 'json and csv are given'), (['--onnx', 'nowhere'], 'onnx is nowhere, but there is no such file'),
                                       (['--onnx', 'WEIGHTS'], 'not a network that can be used'), (['--weights', 'ONNX'], 'not a safetensors file')])
def test_options_that_conflict(args, msg, folder, monkeypatch, capsys):
    tmp, _ = folder
    places = dict(RUN=tmp/'run', ONNX=tmp/'a.onnx', WEIGHTS=WEIGHTS)
    code, out, err = typed(main_predict, monkeypatch, capsys, tmp/'images', *(places.get(o, o) for o in args))
    assert code == 2 and msg in err and err.count('\n') == 1 and out == ''


def test_memory_is_bounded_by_batches(folder, monkeypatch):
    "No more than two batches of files are read before the first result"
    predictor, read = Predictor(), []
    monkeypatch.setattr(predictor, 'pixels', lambda o: read.append(o) or np.zeros((32, 32, 3), np.uint8))
    results = predictor.stream(range(5000))
    next(results)
    assert len(read) <= 512
    results.close()
    assert len(read) <= 512


def test_an_onnx_file_of_changed_bytes(folder, tmp_path):
    "An error of one line or a result, and nothing else"
    data, rng, refused = (folder[0]/'a.onnx').read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        new = bytearray(data)
        for i in rng.integers(len(new), size=3): new[i] = rng.integers(256)
        (tmp_path/'a.onnx').write_bytes(new[:rng.integers(len(new))] if rng.random() < .2 else new)
        start = time.thread_time()
        try: OnnxNet(tmp_path/'a.onnx')
        except ValueError as e:
            refused += 1
            assert str(e).startswith(f'{tmp_path}/a.onnx: ') and '\n' not in str(e)
        assert time.thread_time() - start < 5
    assert refused > 5


# --- without torch and fastai

def script(folder):
    "The program of the tutorial, in a file"
    cells = json.loads((root/'nbs'/'89_deploy.ipynb').read_text(encoding='utf-8'))['cells']
    source = next(s for c in cells if (s := ''.join(c['source'])).startswith('%%writefile classify.py\n')).partition('\n')[2]
    assert len(source.splitlines()) <= 30
    (folder/'classify.py').write_text(source, encoding='utf-8')
    return folder/'classify.py'


@pytest.fixture
def photos(tmp_path):
    "Images that need each step: a large JPEG, one that is turned, transparency, 16 bits, a palette, grey"
    x = np.random.default_rng(0).integers(256, size=(9, 13, 3), dtype=np.uint8)
    im = Image.fromarray(x).resize((900, 640), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[274] = 6
    im.save(tmp_path/'large.jpg'), im.save(tmp_path/'turned.jpg', exif=turned), im.convert('P').save(tmp_path/'palette.png'), im.convert('L').save(tmp_path/'grey.png')
    clear = im.convert('RGBA')
    clear.putalpha(im.convert('L'))
    clear.save(tmp_path/'clear.png')
    Image.fromarray(np.asarray(im.convert('L')).astype(np.uint16)*257).save(tmp_path/'16.png')
    return sorted(tmp_path.iterdir())


BLOCK = """
import runpy, sys
class Block:
    def find_spec(self, name, *args):
        if name.split('.')[0] in ('torch', 'fastai', 'fastcore', 's9_fastai', 'onnx'): raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('resize', RESIZE_NAMES)
def test_a_program_without_torch_and_fastai(folder, photos, resize, tmp_path_factory):
    tmp = tmp_path_factory.mktemp('program')
    path, model = tmp/'a.onnx', onnx.load(folder[0]/'a.onnx')
    next(o for o in model.metadata_props if o.key == 'resize').value = json.dumps(resize)
    onnx.save(model, path)
    done = subprocess.run([sys.executable, '-c', BLOCK, script(tmp), path, *photos], capture_output=True, text=True, cwd=tmp, env={**os.environ, 'PYTHONPATH': ''})
    with redirect_stdout(StringIO()) as out: s9_predict(*photos, onnx=path, tta=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == out.getvalue() and len(done.stdout.splitlines()) == 6


@pytest.mark.slow
def test_a_program_in_an_environment_without_torch(folder, photos, tmp_path_factory):
    tmp = tmp_path_factory.mktemp('environment')
    subprocess.run([sys.executable, '-m', 'venv', tmp/'venv'], check=True)
    python = tmp/'venv'/('Scripts' if os.name == 'nt' else 'bin')/'python'
    made = subprocess.run([python, '-m', 'pip', 'install', '-q', 'numpy', 'pillow', 'onnxruntime'], capture_output=True, text=True)
    if made.returncode: pytest.skip(f'pip cannot install: {made.stderr[-200:]}')
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    assert subprocess.run([python, '-c', 'import torch'], capture_output=True, env=env).returncode == 1
    done = subprocess.run([python, script(tmp), folder[0]/'a.onnx', *photos], capture_output=True, text=True, env=env)
    with redirect_stdout(StringIO()) as out: s9_predict(*photos, onnx=folder[0]/'a.onnx', tta=False)
    assert (done.returncode, done.stdout) == (0, out.getvalue()), done.stderr


def test_predictor_imports_no_fastai():
    code = 'import sys; from s9_fastai.app.predictor import Predictor; Predictor(); print(sorted({"fastai", "torchvision", "albumentations", "pandas", "fasthtml", "onnx"} & {*sys.modules}))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'
