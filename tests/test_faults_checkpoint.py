"Checkpoints and weights that are damaged, of something else, or made by a stranger: refused, or the one before is used; nothing in them runs, nothing is written elsewhere"
import copy
import json
import os
import pickle
import re
import shutil
import signal
import struct
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_faults_training import assert_all_is_whole, command, epoch_re, here, message, mk, outcome, pytestmark, tiny_dls, whole  # noqa: F401

from s9_fastai.resume.checkpoint import Checkpoint
from s9_fastai.app.recipe import get_recipe
from s9_fastai.nets.net import Net
from s9_fastai.nets.original import load_original
from s9_fastai.resume.saved import ResumeError, newest_checkpoint, read_checkpoint
from s9_fastai.core.weights import load_weights, read_tensors, save_weights, write_tensors
from s9_fastai.resume.state import read_state, write_state

fuzz = partial(settings, derandomize=True, deadline=None, database=None)


@pytest.fixture
def run(whole, tmp_path):  # noqa: F811
    "A folder with two epochs of three"
    mk(tmp_path/'run').fit(2)
    mk(tmp_path/'run').fit(2)  # nothing is left to do
    return tmp_path/'run'


def files(run_dir): return sorted((run_dir/'checkpoints').glob('*.safetensors'))
def contents(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name != 'lock'}


class Canary:
    "Unpickled, it makes a file"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def header(data):
    n, = struct.unpack('<Q', data[:8])
    return json.loads(data[8:8 + n]), data[8 + n:]


def lying(data, lie):
    "`data` with a header in which `lie` has changed the entry of the largest tensor"
    head, rest = header(data)
    lie(max((v for k, v in head.items() if k != '__metadata__'), key=lambda v: v['data_offsets'][1] - v['data_offsets'][0]))
    text = json.dumps(head).encode()
    return struct.pack('<Q', len(text)) + text + rest


def set_to(**kwargs): return lambda entry: entry.update(kwargs)


lies = {'a shape larger than its bytes': set_to(shape=[2**40, 2**20]), 'a negative shape': set_to(shape=[-1]), 'another type': set_to(dtype='F64'),
        'no type that there is': set_to(dtype='F65'), 'bytes beyond the end': set_to(data_offsets=[0, 2**62]), 'bytes backwards': set_to(data_offsets=[100, 0]),
        'a shape that overflows': set_to(shape=[2**63, 2**63])}
damages = {'truncated': lambda d: d[:-100], 'cut after its header': lambda d: d[:200], 'empty': lambda d: b'', 'of which a bit is flipped': lambda d: d[:-9] + bytes([d[-9] ^ 4]) + d[-8:],
           'all zeros': lambda d: bytes(len(d)), 'whose header is longer than the file': lambda d: struct.pack('<Q', 2**63) + d[8:],
           **{f'whose header tells {k}': lambda d, lie=lie: lying(d, lie) for k, lie in lies.items()}}


# Weights

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights')/'w.safetensors'
    save_weights(Net(4), path, recipe='{"lr": 0.05}')
    return path.read_bytes()


@pytest.fixture
def refuses(tmp_path):
    "A function that gives the message of `load_weights`, after which the net is what it was"
    def inner(data=None, net=None, path=tmp_path/'w.safetensors'):
        if data is not None: path.write_bytes(data)
        net = net or Net(4)
        before = copy.deepcopy(net.state_dict())
        msg = message((ValueError, OSError), load_weights, net, path)
        assert all(v.equal(before[k]) for k, v in net.state_dict().items()) and str(path) in msg
        return msg
    return inner


@pytest.mark.parametrize('what', damages)
def test_damaged_weights(weights, refuses, fault, what):
    fault('checkpoints', f'weights {what}', refuses(damages[what](weights)))


def test_weights_of_something_else(weights, refuses, fault, tmp_path):
    fault('checkpoints', 'weights of another architecture', refuses(weights, Net(4, norm='gn')))
    fault('checkpoints', 'weights of another n_channels', refuses(weights, Net(8)))
    fault('checkpoints', 'weights of another number of classes', refuses(weights, Net(4, n_classes=9)))
    fault('checkpoints', 'weights whose recipe was changed', refuses(weights.replace(b'0.05', b'0.06')))
    with pytest.raises(FileNotFoundError): load_weights(Net(4), tmp_path/'nowhere')
    with pytest.raises(OSError): load_weights(Net(4), tmp_path)


def test_weights_with_code(refuses, fault, tmp_path):
    torch.save({'fc.weight': Canary(tmp_path/'ran')}, tmp_path/'zip.pth')
    for data in (*(pickle.dumps(Canary(tmp_path/'ran'), n) for n in range(2, 6)), (tmp_path/'zip.pth').read_bytes()): msg = refuses(data)
    fault('checkpoints', 'weights that are a pickle with code', msg)
    fault('checkpoints', 'original weights with code', message(ValueError, load_original, Net(4), tmp_path/'zip.pth'))
    assert not (tmp_path/'ran').exists()
    refuses(pickle.dumps(Canary(tmp_path/'ran'), 0))
    assert not (tmp_path/'ran').exists()


# Damaged checkpoints

@pytest.mark.parametrize('what', damages)
def test_the_newest_checkpoint_is_damaged(run, whole, fault, what):  # noqa: F811
    "The one before is used, and the run ends bit for bit like the whole one"
    before, newest = files(run)
    newest.write_bytes(damages[what](newest.read_bytes()))
    learn = mk(run, seed=9)
    with pytest.warns(UserWarning, match='is used') as found: learn.fit(3)
    assert len(found) == 1 and str(found[0].message).endswith(f'The checkpoint before is used: {before}')
    assert outcome(learn, run) == whole
    fault('checkpoints', f'a newest checkpoint {what}', found[0].message)


replaced = {'that is a pickle with code': lambda p: p.write_bytes(pickle.dumps(Canary(p.parent/'ran'))), 'that is a file of weights': lambda p: save_weights(Net(4), p),
            'that cannot be read': lambda p: (p.unlink(), p.symlink_to(p)), 'that is of another program': lambda p: write_tensors(p, {'json': torch.zeros(3)})}


@pytest.mark.parametrize('what', replaced)
def test_the_newest_checkpoint_is_something_else(run, whole, fault, what):  # noqa: F811
    replaced[what](files(run)[1])
    learn = mk(run, seed=9)
    with pytest.warns(UserWarning, match='is used') as found: learn.fit(3)
    assert outcome(learn, run) == whole and not (run/'checkpoints'/'ran').exists()
    fault('checkpoints', f'a newest checkpoint {what}', found[0].message)


def test_all_checkpoints_are_damaged(run, fault):
    for p in files(run): p.write_bytes(p.read_bytes()[:500])
    before = contents(run)
    fault('checkpoints', 'all checkpoints damaged', message(ResumeError, mk(run).fit, 3))
    assert contents(run) == before


def test_the_command_with_damaged_checkpoints(tmp_path, here, fault):  # noqa: F811
    args = '--data', 'sample', '--recipe', 'stated', '--bs', 500, '--norm', 'ln', '--n-channels', 4
    whole = here(*args, '--epochs', 2, '--out', tmp_path/'whole')  # noqa: F811
    assert whole[0] == 0 and here(*args, '--epochs', 1, '--out', tmp_path/'run')[0] == 0
    newest = files(tmp_path/'run')[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    code, out, err = here('--resume', tmp_path/'run', '--epochs', 2)
    assert code == 0 and err.count('\n') == 1 and 'resuming from the start' in out
    fault('checkpoints', 's9_train with a damaged checkpoint', err)
    assert (tmp_path/'run'/'log.txt').read_text() == (tmp_path/'whole'/'log.txt').read_text()
    a, b = (read_tensors(tmp_path/nm/'weights.safetensors')[0] for nm in ('run', 'whole'))
    assert all(v.equal(b[k]) for k, v in a.items())
    for p in files(tmp_path/'run'): p.write_bytes(b'')
    before = contents(tmp_path/'run')
    code, _, err = here('--resume', tmp_path/'run', '--epochs', 3)
    assert code == 2 and err.count('\n') == 1 and contents(tmp_path/'run') == before
    fault('checkpoints', 's9_train with damaged checkpoints only', err)


def test_a_checkpoint_of_another_net(run, fault):
    before = contents(run)
    for what, kwargs in {'another architecture': dict(norm='gn'), 'another n_channels': dict(n_channels=8)}.items():
        recipe = get_recipe(**{**dict(n_channels=4, step_size=2, compute='plain'), **kwargs})
        fault('checkpoints', f'a checkpoint of {what}', message(ResumeError, mk(run, recipe=recipe).fit, 3))
        forced = message(ResumeError, mk(run, recipe=recipe, force=True).fit, 3)
        assert 'what this one has saved does not fit' in forced
        fault('checkpoints', f'a checkpoint of {what}, forced', forced)
    assert contents(run) == before


# The folder

@pytest.mark.parametrize('nm', ['log.txt', 'history.csv'])
def test_a_log_that_was_changed_by_hand(run, whole, fault, nm):  # noqa: F811
    path, other = run/nm, run/{'log.txt': 'history.csv', 'history.csv': 'log.txt'}[nm]
    right = path.read_bytes()
    with open(other, 'a') as f: f.write('by hand\n')  # too long, and still so after each refusal
    for what, do in {'removed': path.unlink, 'shortened': lambda: path.write_bytes(right[:-20])}.items():
        path.write_bytes(right)
        do()
        before = contents(run)
        msg = message(ResumeError, mk(run).fit, 3)
        now = f'has {path.stat().st_size} bytes' if path.exists() else 'is gone'
        assert f'{nm} {now}, but had {len(right)} bytes when the run stopped: put it back' in msg
        fault('checkpoints', f'{nm} {what}', re.sub(r'\d+ bytes', '… bytes', msg))  # the digits of a loss differ with the number of threads
        assert contents(run) == before
    path.write_bytes(right + b'half a li')
    learn = mk(run, seed=9)
    learn.fit(3)
    assert outcome(learn, run) == whole
    fault('checkpoints', f'{nm} longer than the checkpoint knows', 'no message: it is cut')


def test_a_history_without_a_checkpoint(run, fault):
    shutil.rmtree(run/'checkpoints')
    for nm in ('history.csv', 'log.txt'):
        fault('checkpoints', f'the {nm} of a run without a checkpoint', message(ResumeError, mk(run).fit, 3))
        (run/nm).unlink()


def test_two_processes(tmp_path, fault, here):  # noqa: F811
    "The second is refused before it writes; once the first is killed, its leftovers are cleared, and nothing else is"
    run_dir = tmp_path/'run'
    p = command('--epochs', 50, '--out', run_dir, cwd=tmp_path)
    p.wait_for('epoch   1')
    told = (run_dir/'recipe.json').read_bytes()
    fault('checkpoints', 'two Learners in one folder', message(ResumeError, mk(run_dir).fit, 3))
    code, _, err = here('--resume', run_dir, '--epochs', 60)
    assert code == 2 and err.count('\n') == 1 and (run_dir/'recipe.json').read_bytes() == told
    fault('checkpoints', 's9_train twice in one folder', err.replace(str(p.pid), '1234'))
    os.kill(p.pid, signal.SIGKILL)
    p.end()
    (tmp_path/'run'/'log.txt').open('a').write('EPO')
    kept = [run_dir/nm for nm in ('.2024-notes.txt', '.123', '.x-recipe.json', 'checkpoints/my.safetensors', 'checkpoints/2024-my.safetensors', 'checkpoints/.2024-notes')]
    left = [run_dir/nm for nm in ('.123-recipe.json', '.123-curves.png', '.123-weights.safetensors', 'checkpoints/.123-00-00001-train-000000.safetensors')]
    for f in (*kept, *left): f.write_bytes(b'x')
    n = newest_checkpoint(run_dir)[0]['place'].epoch
    code, out, err = here('--resume', run_dir, '--epochs', n + 1)
    assert (code, err) == (0, '') and f'resuming from the end of epoch {n}' in out
    assert all(f.read_bytes() == b'x' for f in kept) and not any(f.exists() for f in left)
    assert epoch_re.sub('', (run_dir/'log.txt').read_text()) == ''


# A stranger, who knows how the checksum is made

def callback(name): return lambda s: next(o for nm, o in s['callbacks'] if nm == name)
def put(get, k, v): return lambda s: get(s).__setitem__(k, v)
def attr(name, k, v): return put(callback(name), k, {'value': v})
def place(*v): return put(lambda s: s, 'place', v)


def nested(depth):
    o = []
    for _ in range(depth): o = [o]
    return o


everything, loader = (lambda s: s), (lambda s: s['loaders'][0])
forged = {
    'the folder of the log': attr('run_log', 'run_dir', 'elsewhere'), 'all attributes of a callback': attr('run_log', '__dict__', {'run_dir': 'elsewhere', 'sizes': {}, 'n_done': 0}),
    'the class of a callback': attr('run_log', '__class__', 3), 'a method': attr('run_log', 'append', 1), 'a property': attr('recorder', '_valid_mets', []),
    'a text in the place of a number': attr('run_log', 'n_done', 'os.system'), 'a list in the place of a number': attr('run_log', 'n_done', [1]),
    'the size of a file, negative': attr('run_log', 'sizes', {'log.txt': -1, 'history.csv': 0}), 'the size of a file, a text': attr('run_log', 'sizes', {'log.txt': 'x'}),
    'an attribute without a name': put(callback('run_log'), 3, {'value': 1}), 'an attribute of no kind': put(callback('run_log'), 'n_done', 5),
    'a place before the start': place(-1, 'train', 0), 'a place in no part': place(1, 'x', 0), 'a place between batches': place(1, 'train', 'y'),
    'a place after the end': place(10**9, 'train', 0), 'a place after the last batch': place(1, 'train', 10**9), 'a place of two': place(1, 'train'), 'a place that is true': place(True, 'train', 0),
    'a billion epochs': lambda s: (s['fits'][0].update(n_epoch=10**9), s.update(place=(10**9, 'train', 0))),
    'no settings': put(everything, 'fits', []), 'settings that are tensors': put(lambda s: s['fits'][0], 'lr', torch.ones(3)), 'settings of no kind': put(everything, 'fits', [3]),
    'an endless time': put(everything, 'time', float('inf')),
    'a negative epoch of a loader': put(loader, 'epoch', -5), 'a seed that is text': put(loader, 'seed', 'x'), 'a loader without a seed': lambda s: s['loaders'][0].pop('seed'),
    'a generator of a loader of no kind': put(lambda s: s['changed']['loaders[0]'], 'rng', (3, (1, 2), None)), 'an object that is not there': put(lambda s: s['changed'], 'os', dict(environ={})),
    'a changed method': put(lambda s: s['changed']['loaders[0]'], 'sample', 1), 'a changed setting in words': put(lambda s: s['changed'], 'run_log', dict(run_dir='elsewhere')), 'too few loaders': lambda s: s['loaders'].pop(),
    'a generator of numpy out of range': lambda s: s['random'].update(numpy=(*s['random']['numpy'][:2], 10**6, *s['random']['numpy'][3:])),
    'a generator of numpy beyond all numbers': lambda s: s['random'].update(numpy=(*s['random']['numpy'][:2], 10**30, *s['random']['numpy'][3:])),
    'a generator of torch cut short': lambda s: s['random'].update(torch=s['random']['torch'][:9]), 'no generators': put(everything, 'random', {}),
    'a rate that is no number': lambda s: s['opt']['hypers'][0].update(lr=float('nan')), 'a rate that is text': lambda s: s['opt']['hypers'][0].update(lr='x'),
    'an average of another shape': lambda s: s['opt']['state'][0].update(grad_avg=torch.zeros(3)), 'no groups': lambda s: s['opt'].update(hypers=[]),
    'weights of another shape': lambda s: s['model'].update({'fc.bias': torch.zeros(3)}), 'weights that are text': lambda s: s['model'].update({'fc.bias': 'x'}),
    'gradients that are text': lambda s: s['grads'].__setitem__(0, 'x'), 'too few gradients': lambda s: s['grads'].pop(), 'too few metrics': lambda s: s['metrics'].pop(),
    'a counter that is text': lambda s: s['learner'].update(iter='x'), 'a loss that is text': lambda s: s['learner'].update(loss='x'),
    'callbacks without names': put(everything, 'callbacks', [3]), 'deep nesting': put(everything, 'learner', {'iter': nested(300)}),
}


@pytest.fixture(scope='module')
def state(tmp_path_factory):
    "A checkpoint, and the folder of its run, in the middle of the second epoch"
    run_dir = tmp_path_factory.mktemp('stranger')
    mk(run_dir).fit(2)
    return run_dir


@pytest.mark.parametrize('what', forged)
def test_a_forged_checkpoint(state, tmp_path, fault, what, monkeypatch):
    "The only one there; what was in the folders is as it was before"
    shutil.copytree(state, tmp_path/'run')
    for p in files(tmp_path/'run')[:-1]: p.unlink()
    path, = files(tmp_path/'run')
    s = read_state(path)
    forged[what](s)
    write_state(path, s)
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    msg = message(ValueError, mk(tmp_path/'run').fit, 3)
    assert str(path) in msg or what.startswith('the size of') or what == 'a billion epochs'
    assert contents(tmp_path) == before
    fault('checkpoints', f'a forged checkpoint: {what}', msg)


@pytest.mark.parametrize('k', ['callbacks', 'done', 'fits', 'grads', 'learner', 'loaders', 'metrics', 'model', 'opt', 'place', 'random', 'time'])
def test_a_forged_checkpoint_lacks_a_key_or_has_another_type_there(state, tmp_path, k):
    s = read_state(files(state)[-1])
    for wrong in ('gone', 5, 'text', [], {}, None, torch.ones(2)):
        t = {**s, k: wrong}
        if isinstance(wrong, str) and wrong == 'gone': del t[k]
        write_state(tmp_path/'c.safetensors', t)
        if isinstance(wrong, type(s[k])): continue  # an empty list or dict: what is done with it is another test's matter
        assert f'{k} ' in message(ValueError, read_checkpoint, tmp_path/'c.safetensors')


raw = {'a list where a kind should be': '[1]', 'a kind that there is not': '{"eval": "1"}', 'nothing': '{}', 'no JSON': '{"dict"', 'nesting that is too deep': '{"list": ['*100_000 + ']}'*100_000,
       'nesting that is too deep for JSON': '['*1_000_000, 'a tensor that is not there': '{"tensor": 9999}', 'a tensor before the first': '{"tensor": -1}',
       'a tensor in two places': '{"list": [{"tensor": 0}, {"tensor": 0}]}', 'a key that cannot be one': '{"dict": [[{"list": []}, 1]]}', 'a number of a million digits': '1'*1_000_000}


@pytest.mark.parametrize('what', raw)
def test_a_file_with_other_json(tmp_path, fault, what):
    write_tensors(tmp_path/'c.safetensors', {'json': torch.frombuffer(bytearray(raw[what].encode()), dtype=torch.uint8), '0': torch.ones(3)})
    msg = message(ValueError, read_checkpoint, tmp_path/'c.safetensors')
    if 'digits' not in what: fault('checkpoints', f'a checkpoint with {what}', msg)  # how many are too many is Python's affair


# Anything

def mutated(draw, data):
    "`data` after a few accidents"
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at, n = draw(st.integers(0, len(data) or 1)), draw(st.integers(1, 64))
        if draw(st.booleans()): at = draw(st.integers(0, min(len(data), 400)))  # where the header is
        kind = draw(st.sampled_from(['flip', 'cut', 'insert', 'zero', 'repeat', 'remove']))
        if kind == 'flip' and at < len(data): data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 'cut': del data[at:]
        elif kind == 'insert': data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == 'zero': data[at:at + n] = bytes(len(data[at:at + n]))
        elif kind == 'repeat': data[at:at] = data[at:at + n]
        else: del data[at:at + n]
    return bytes(data)


@pytest.mark.parametrize('what', ['weights', 'checkpoint'])
def test_any_damage(weights, state, tmp_path, what):
    "It is refused, or the content is what it was"
    path = tmp_path/'f.safetensors'
    whole = weights if what == 'weights' else files(state)[-1].read_bytes()  # noqa: F811
    path.write_bytes(whole)
    right, about = read_tensors(path)
    net = Net(4)

    @fuzz(max_examples=250 if what == 'weights' else 150)
    @given(st.data())
    def check(data):
        path.write_bytes(mutated(data.draw, whole))
        for f in (read_tensors, lambda p: load_weights(net, p)) if what == 'weights' else (read_checkpoint,):
            try: f(path)
            except (ValueError, OSError): continue
            found, texts = read_tensors(path)
            assert list(found) == list(right) and all(v.equal(found[k]) for k, v in right.items())
            assert sorted(texts.values()) == sorted(about.values())  # who damages the name `checksum` makes a file of another program
    check()


def parts(o, at=()):
    "The place of each part of the JSON `o`; few of a long list"
    yield at
    items = o.items() if isinstance(o, dict) else [(i, o[i]) for i in sorted({*range(min(len(o), 12)), *range(max(0, len(o) - 4), len(o))})] if isinstance(o, list) else ()
    for k, v in items: yield from parts(v, (*at, k))


def replace_part(o, at, v):
    if not at: return v
    o = copy.copy(o)
    o[at[0]] = replace_part(o[at[0]], at[1:], v)
    return o


scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 5), st.sampled_from([10**9, -10**30, 2**63, float('nan'), float('inf'), -0.5, 1e300]), st.sampled_from(['', 'x', '__dict__', 'train', '/etc/passwd']))
values = st.one_of(scalars, st.builds(lambda v: {'list': v}, st.lists(scalars, max_size=3)), st.builds(lambda v: {'tuple': v}, st.lists(scalars, max_size=3)),
                   st.builds(lambda k, v: {'dict': [[k, {'dict': [['value', v]]}]]}, scalars, scalars), st.builds(lambda i: {'tensor': i}, st.integers(0, 140)), st.builds(lambda v: [v], scalars))


def forger(run_dir):
    "The JSON of the newest checkpoint in `run_dir`, and a function that puts another one in its place, all else as it is now"
    for p in files(run_dir)[:-1]: p.unlink()
    path, = files(run_dir)
    tensors, _ = read_tensors(path)
    kept = {nm: (run_dir/nm).read_bytes() for nm in ('log.txt', 'history.csv')}
    def forge(o):
        for p in files(run_dir): p.unlink()
        for nm, data in kept.items(): (run_dir/nm).write_bytes(data)
        text = json.dumps(o).encode()
        write_tensors(path, {**tensors, 'json': torch.frombuffer(bytearray(text), dtype=torch.uint8)})
    return json.loads(tensors['json'].numpy().tobytes()), forge


def test_any_forgery(state, tmp_path, monkeypatch):
    "A part of the JSON is replaced by anything, and the checksum is right: ValueError, or the fit goes on"
    shutil.copytree(state, tmp_path/'run')
    (tmp_path/'elsewhere').mkdir()
    right, forge = forger(tmp_path/'run')
    dls, seen, results = tiny_dls(), [], []

    real = Checkpoint.restore
    monkeypatch.setattr(Checkpoint, 'restore', lambda self: (real(self), seen.append('restored'))[0])

    @fuzz(max_examples=100)
    @given(st.sampled_from([*parts(right)]), values)
    def check(at, v):
        forge(replace_part(right, at, v))
        learn = mk(tmp_path/'run', dls)
        seen.clear()
        try: learn.fit(3)
        except ValueError: results.append('refused')
        except Exception:  # numbers that somebody else's callback can make nothing of
            assert seen == ['restored']
            results.append('failed')
        else: results.append('done')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        check()
    assert not any((tmp_path/'elsewhere').iterdir()) and {'refused', 'done'} <= {*results}
