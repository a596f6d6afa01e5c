"Files that would hang their reader, fill its memory or give other results: refused in one line. The longer runs are in benchmarks/trust"
import ast
import os
import sys
import time
from pathlib import Path

import pytest
import torch

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root/'benchmarks'/'trust'), str(root/'benchmarks')]
import fuzz  # noqa: E402
import hostile  # noqa: E402

from s9_fastai.core.files import append_text, cut_file  # noqa: E402
from s9_fastai.core.weights import TensorFile, load_weights, write_tensors  # noqa: E402
from s9_fastai.nets.net import Net  # noqa: E402
from s9_fastai.resume.objects import check_value  # noqa: E402
from s9_fastai.training.distill import TeacherLogits  # noqa: E402

posix = pytest.mark.skipif(os.name == 'nt', reason='Windows has no such files')
pytestmark = pytest.mark.filterwarnings('ignore')


def refused(what, folder):
    "The message for the hostile file `what`, which a reader in this very process gets"
    reader, make = hostile.FILES[what]
    path = fuzz.sound_file(reader, folder)
    path.unlink()
    make(path)
    with pytest.raises((ValueError, OSError)) as e: fuzz.READERS[reader](path)
    assert fuzz.fault(e.value) is None
    return str(e.value)


@posix
@pytest.mark.parametrize('what', [k for k in hostile.FILES if k.startswith(('a pipe', 'a link'))])
def test_what_is_no_regular_file_is_not_opened(tmp_path, what):
    "It would block for ever, or read without an end"
    message = refused(what, tmp_path)
    assert any(o in message for o in ('a pipe, but', 'a device, but', 'not a file', 'no such file', 'no recipe.json there'))


@posix
def test_nothing_is_written_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path/'log')
    for f, *args in ((append_text, 'x'), (cut_file, 0)):
        with pytest.raises(OSError, match='log cannot be written'): f(tmp_path/'log', *args)


quick = {'pickle: bytearray(10**10)': 'builtin__.bytearray is refused', 'pickle: LONG_BINPUT 2**31 - 1': 'LONG_BINPUT 2147483647 is refused', 'pickle: a key of 2**60 tuples': 'only a few texts',
         'pickle: a set of 50,000 numbers of one hash': 'the instruction EMPTY_SET is refused', 'tar: a member of 2 GB': 'more than 402653184 bytes; unpack it',
         'original: bytearray(10**10)': 'damaged, or not weights alone', 'weights: a tensor of 8 GB of zeros': 'were ever written', 'teacher: logits of 8 GB of zeros': 'bytes that are allowed (',
         'net: a million million classes': 'n_classes is 1000000000000', 'net: images of 10**6 pixels': 'images of 1000000 pixels, allowed are at most 1024', 'net: NaN weights': 'values of conv1.conv.weight are not finite',
         'net: infinite weights': 'values of conv1.conv.weight are not finite', 'net: weights of 3e38': 'its logits are not finite', 'checkpoint: a loss of whole numbers': 'its loss is torch.int64 []',
         'checkpoint: a complex loss': 'its loss is torch.complex64 []', 'history: a line of 300 MB': 'more than the 16777216 bytes', 'recipe: 300 MB': 'more than the 1048576 bytes',
         'cache: meta.json of nested lists': 'the cache is damaged', 'png: 4 * 10**18 pixels': 'cannot be read as an image'}


@pytest.mark.parametrize('what', quick)
def test_small_files_that_would_take_gigabytes_or_give_nan(tmp_path, what):
    start = time.thread_time()
    message = refused(what, tmp_path)
    assert quick[what] in message or what.startswith('png') and 'make it smaller' in message
    assert time.thread_time() - start < 5


def test_no_data_of_other_tensors_is_read(tmp_path, monkeypatch):
    "Names, types and shapes are compared first"
    monkeypatch.setattr(TensorFile, 'read', lambda *args: pytest.fail('data was read'))
    write_tensors(tmp_path/'a', {**Net(4).state_dict(), 'more': torch.ones(2)})
    for read in (lambda p: load_weights(Net(4), p), TeacherLogits.load):
        with pytest.raises(ValueError, match='more|no teacher'): read(tmp_path/'a')


def test_a_tensor_does_not_become_one_of_narrower_or_complex_numbers():
    class Metric: pass
    o = Metric()
    for now, v in ((torch.tensor(0.), torch.tensor(3)), (0., torch.tensor(3)), (0, torch.tensor(3j)), (torch.tensor(3), torch.tensor(True))):
        o.total = now
        with pytest.raises(ValueError, match=f'total of Metric is of {v.dtype} in place of'): check_value(o, 'total', v)
    for now, v in ((0, torch.tensor(3.)), (torch.tensor(3), torch.tensor(3.)), (0., torch.tensor(3.).half())):
        o.total = now
        check_value(o, 'total', v)


@pytest.mark.parametrize('reader', fuzz.READERS)
def test_files_of_changed_bytes(tmp_path, reader):
    found = fuzz.fuzz(reader, tmp_path, count=25 if reader in ('original', 'weights') else 60)
    assert found['faults'] == [] and found['refused'] > 5


# One way to open a file

OPENS = {'open', 'read_text', 'read_bytes', 'read_csv', 'safe_open', 'load_file', 'ZipFile', 'fromfile', 'loadtxt', 'memmap', 'load'}
ALLOWED = {  # a module, and what it may call
    'core.files': ('open', 'opens for all others'),
    'core.environment': ('read_text', "the system's own file"),
    'core.budget': ('ZipFile', 'of a file that is open'),
    'nets.pickled': ('ZipFile load', 'of a file that is open'),
    'cifar.archives': ('open', 'of a file that is open'),
    'data.cache': ('open memmap', 'files that it writes; an array of a file that is open'),
    'core.cores': ('read_text', "the system's own files"),
    'cifar.pickles': ('load', 'of bytes'),
    'cifar.png': ('open load', 'of bytes'),
    'cifar.download': ('open', 'files that it writes'),
    'data.images': ('open', 'of bytes'),
    'data.items': ('open', 'a file that it writes'),
    'data.tables': ('read_csv', 'of bytes'),
    'report.plots': ('read_csv', 'of bytes'),
    'resume.learner': ('read_text', 'the file of a CSVLogger, which is open'),
    **{k: ('load', 'of `TeacherLogits`') for k in ('app.teacher', 'app.training')},
    'app.formats': ('load', 'a file of `torch.export` that it has written'),
    'nets.export': ('load', 'a file that it has written'),
    **{k: ('read_text', "the package's own file") for k in ('app.options', 'report.page')},
    'core.archives': ('ZipFile open', 'of a file that is open, and its members'),
    **{k: ('open', 'the null device') for k in ('app.command', 'app.entry', 'app.launch', 'core.signals')},
    'app.folder': ('open', 'the folder itself'),
    'app.job': ('open', 'the output of a run, to write'),
    'training.collect': ('load', 'bytes of the other processes of the same training'),
}


def opens(code):
    "What `code` calls that may open a file"
    calls = [n.func for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
    return {f.id if isinstance(f, ast.Name) else f.attr for f in calls if isinstance(f, (ast.Name, ast.Attribute)) and (f.id if isinstance(f, ast.Name) else f.attr) in OPENS}


def test_each_file_from_outside_is_opened_in_one_way():
    found = {'.'.join(p.relative_to(root/'s9_fastai').with_suffix('').parts): opens(p.read_text(encoding='utf-8')) for p in (root/'s9_fastai').rglob('*.py')}
    assert {k: more for k, v in found.items() if (more := v - {*ALLOWED.get(k, ('',))[0].split()})} == {}
    assert sum(map(len, found.values())) > 10


def test_that_check_sees_another_way(): assert opens('import numpy as np\nx = np.load(path)\ny = Path(p).read_text()') == {'load', 'read_text'}
