"The habits that CONTRIBUTING.md names, each with a check"
import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from fastcore.docments import docments
from processes import run

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').glob('*.ipynb'))
package = root/'s9_fastai'
modules = sorted(p for p in package.rglob('*.py') if not p.name.startswith('_'))


def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def sources(nb, kind='code'): return [''.join(c['source']) for c in cells(nb) if c['cell_type'] == kind]
def exported(nb): return '\n'.join(s for s in sources(nb) if re.match(r'#\| *export\b', s))


def module_of(nb):
    found = re.search(r'#\| *default_exp +(\S+)', '\n'.join(sources(nb)))
    return found and found[1]


def name_of(path): return '.'.join(path.relative_to(package).with_suffix('').parts)  # such as `augment.batch`


def imports(code, name=''):
    "The modules of ours that `code`, of the module `name`, imports, by dotted name; `from s9_fastai.core import files` is one of core.files"
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if not isinstance(node, ast.ImportFrom): continue
        above = ['s9_fastai', *name.split('.')][:-node.level] if node.level else []  # `..core` from augment.batch
        base = '.'.join([*above, *(node.module or '').split('.')]).strip('.')
        found |= {base, *(f'{base}.{a.name}' for a in node.names)}
    return {o.removeprefix('s9_fastai.') for o in found if o.startswith('s9_fastai.')} & {*map(name_of, modules)}


def private_imports(code):
    "The names with a leading underscore that `code` imports from modules of ours; `__version__` is not one"
    froms = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom) and (n.level or n.module.split('.')[0] == 's9_fastai')]
    return [f'{n.module or "."}.{a.name}' for n in froms for a in n.names if re.match('_(?!_)', a.name)]


WINGS = ('core', 'augment', 'data', 'nets', 'report', 'cifar', 'training', 'resume', 'app')
MAY_IMPORT = {'core': (), 'augment': ('core',), 'data': ('core', 'augment'), 'nets': ('core',), 'report': ('core',), 'cifar': ('core', 'augment', 'data'),
              'training': ('core', 'augment.keyed', 'augment.keys', 'augment.share', 'data'), 'resume': ('core', 'augment.keyed', 'data.loader', 'training'), 'app': WINGS}
by_name = {name_of(m): m.read_text(encoding='utf-8') for m in modules}
edges = {nm: imports(code, nm) for nm, code in by_name.items()}
outside = {nm: {n.split('.')[0] for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, 'level', 0)
                for n in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])} for nm, code in by_name.items()}


layer = {module_of(nb): int(nb.name[:2]) for nb in notebooks if module_of(nb)}
in_wings = [nm for nm in by_name if '.' in nm]


def test_there_is_something_to_check(): assert len(modules) > 50 and len(notebooks) > 50 and sum(map(len, edges.values())) > 150


@pytest.mark.parametrize('code, name, there', [
    ('from s9_fastai.core.text import shown', '', {'core.text'}), ('from s9_fastai.core import text', '', {'core.text'}), ('import s9_fastai.core.text as t', '', {'core.text'}),
    ('from ..core.text import shown', 'augment.batch', {'core.text'}), ('from .keys import item_seed', 'augment.batch', {'augment.keys'}), ('from . import keys', 'augment.batch', {'augment.keys'}),
    ('def f():\n    from .net import Net', 'nets.tta', {'nets.net'}), ('import numpy', 'nets.tta', set())])
def test_imports_are_read(code, name, there): assert imports(code, name) == there


@pytest.mark.parametrize('code, there', [
    ('from .keys import item_seed, _hash', ['keys._hash']), ('from s9_fastai.core.text import _shown as shown', ['s9_fastai.core.text._shown']),
    ('def f():\n    from . import _modidx', ['.._modidx']), ('from ..core.text import shown', []), ('from .. import __version__', []), ('from fastai.data.load import _FakeLoader', [])])
def test_private_imports_are_read(code, there): assert private_imports(code) == there


def test_no_private_name_is_imported(): assert {nm: found for nm, code in by_name.items() if (found := private_imports(code))} == {}


def test_a_wing_imports_wings_above_it():
    def below(nm):
        wing = nm.split('.')[0]
        return {d for d in edges[nm] if d.split('.')[0] != wing and d not in MAY_IMPORT[wing] and d.split('.')[0] not in MAY_IMPORT[wing]}
    assert {nm: found for nm in in_wings if (found := below(nm))} == {}


def test_every_module_is_in_a_wing():
    assert {nm.split('.')[0] for nm in in_wings} == {*WINGS} and {nm for nm in by_name if '.' not in nm} == {'all', 'test_utils', 'train'}


@pytest.mark.parametrize('library, wings', [('albumentations', {'augment'}), ('matplotlib', {'report'}), ('pandas', {'report', 'data'}), ('argparse', {'app'})])
def test_a_library_is_imported_in_its_wing_only(library, wings):
    assert {nm.split('.')[0] for nm, libs in outside.items() if library in libs} == wings


def test_option_names_are_in_app_only():
    "Another program that uses the package has no command line of ours"
    code = {nm: text for nm, text in by_name.items() if nm.split('.')[0] != 'app'}
    assert {nm: found for nm, text in code.items() if (found := re.findall(r'--[a-z][a-z-]+', text))} == {}


def test_parts_for_any_learner_load_no_more_than_they_need():
    "All of them, in one new process: neither albumentations, nor CIFAR-10, nor the application, nor pandas before a report"
    def loaded(*wings):
        names = [nm for nm in in_wings if nm.split('.')[0] in wings]
        code = f'import sys, {", ".join("s9_fastai." + nm for nm in names)}; print(*sys.modules)'
        return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout.split()
    found = loaded('core', 'nets', 'report', 'training', 'resume')
    assert [m for m in found if m.split('.')[0] == 'albumentations' or m.startswith(('s9_fastai.cifar', 's9_fastai.app'))] == []
    assert 's9_fastai.resume.checkpoint' in found


def test_exported_cells_import_lower_numbers_only():
    def higher(nb): return {m: layer[m] for m in imports(exported(nb)) if layer[m] >= int(nb.name[:2])}
    assert {nb.name: found for nb in notebooks if module_of(nb) and (found := higher(nb))} == {}


@pytest.mark.parametrize('nb', notebooks, ids=lambda nb: nb.name)
def test_notebook_is_clean(nb):
    assert nb.stat().st_size < 300_000
    ids = [c.get('id') for c in cells(nb)]
    assert all(ids) and len(set(ids)) == len(ids)
    assert all(c.get('execution_count') is None for c in cells(nb))


def test_each_module_is_exported_from_a_notebook(): assert {*map(name_of, modules)} - {*layer} == {'all', 'train'}


def test_functions_fit_one_glance():
    long = {f'{nm}.{n.name}': n.end_lineno - n.body[0].lineno + 1 for nm, code in by_name.items() for n in ast.walk(ast.parse(code))
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.end_lineno - n.body[0].lineno + 1 > 20}
    assert long == {}


def test_no_undefined_or_unused_names():
    read = [m for m in modules if name_of(m) != 'all']  # which has nothing but star imports
    run = subprocess.run([sys.executable, '-m', 'pyflakes', *map(str, read)], capture_output=True, text=True)
    def line(text):
        path, n = re.match(r'(.*?):([0-9]+):', text).groups()
        return Path(path).read_text(encoding='utf-8').split('\n')[int(n) - 1]
    assert [ln for ln in run.stdout.splitlines() if '#' not in line(ln)] == []  # a comment says why it is imported


# each in a fork of its own: they share what others wrote, which is slow to import, and the compiled code of ours
alone = """
import os, sys, traceback, warnings
assert 's9_fastai' not in sys.modules
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
for name in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        warnings.simplefilter('error', UserWarning)
        try: __import__(f's9_fastai.{name}')
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush(), os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]: print(name)
"""


def test_each_module_imports_alone(tmp_path):
    "In a new process each: what a notebook's other cells imported must not be needed"
    (tmp_path/'alone.py').write_text(alone)
    done = run(tmp_path/'alone.py', tmp_path/'compiled', *map(name_of, modules))
    assert (done.returncode, done.stdout) == (0, ''), done.stderr


def public_symbols():
    for m in modules:
        mod = importlib.import_module(f's9_fastai.{name_of(m)}')
        for nm in getattr(mod, '__all__', []):
            o = getattr(mod, nm)
            if getattr(o, '__module__', None) == mod.__name__: yield f'{name_of(m)}.{nm}', o


def undocumented(o):
    "What `o` lacks: a docstring, or a comment for each of these parameters"
    assert inspect.isclass(o) or inspect.isfunction(o), o
    if o.__name__.startswith('main_') or o.__name__ == 'encodes': return []  # an entry point without parameters; a type-dispatched extension
    if not (inspect.getdoc(o) or '').strip(): return ['docstring']
    target = o.__init__ if inspect.isclass(o) and '__init__' in vars(o) and not is_dataclass(o) else o
    if inspect.isclass(o) and target is o and not is_dataclass(o): return []  # its parameters are its parent's
    docs = docments(target)
    named = [k for k, p in inspect.signature(target).parameters.items() if k != 'self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return [k for k in named if not docs.get(k)]


def test_public_symbols_are_documented():
    found = dict(public_symbols())
    assert len(found) > 400 and {nm: lacks for nm, o in found.items() if (lacks := undocumented(o))} == {}


def test_nothing_speaks_of_one_machine():
    words = '|'.join(['/wor' + 'k/', '/tm' + 'p/', r'\.\./sha' + 'red', '/ro' + 'ot/', r'pypi\.o' + 'rg'])
    files = subprocess.run(['git', 'grep', '-lEI', words, '--', '.', ':!.ci/run'], cwd=root, capture_output=True, text=True).stdout.split()
    assert files == []


def test_lines_fit_the_screen():
    assert [f'{nm}, line {i}' for nm, code in by_name.items() for i, ln in enumerate(code.split('\n'), 1) if len(ln) > 120 and '__all__' not in ln] == []


# How the notebooks are written

sys.path.insert(0, str(root/'tools'))
from shape import cells, complexity, count  # noqa: E402

shapes = {nm: [row for row in count(found)] for nm, found in cells(root)}


def test_each_exported_cell_has_prose_before_it_and_one_public_symbol():
    assert len(shapes) > 50 and sum(map(len, shapes.values())) > 400
    assert {nm: sum(bare for _, _, _, bare, _ in rows) for nm, rows in shapes.items() if any(row[3] for row in rows)} == {}
    assert {nm: [n for *_, n in rows] for nm, rows in shapes.items() if any(row[4] > 1 for row in rows)} == {}


def test_no_function_is_complex():
    found = {k: v for p in (root/'s9_fastai').rglob('*.py') if p.name[0] != '_' for k, v in complexity(p).items()}
    assert len(found) > 400 and {k: v for k, v in found.items() if v > 10} == {}
