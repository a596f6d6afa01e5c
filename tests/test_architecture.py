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
from processes import server

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').glob('*.ipynb'))
modules = sorted(p for p in (root/'s9_fastai').glob('*.py') if not p.name.startswith('_'))


def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def sources(nb, kind='code'): return [''.join(c['source']) for c in cells(nb) if c['cell_type'] == kind]
def exported(nb): return '\n'.join(s for s in sources(nb) if re.match(r'#\| *export\b', s))


def module_of(nb):
    found = re.search(r'#\| *default_exp +(\S+)', '\n'.join(sources(nb)))
    return found and found[1]


def imports(code): return set(re.findall(r'^\s*(?:from|import) s9_fastai\.(\w+)', code, re.M))


layer = {module_of(nb): int(nb.name[:2]) for nb in notebooks if module_of(nb)}


def test_there_is_something_to_check(): assert len(modules) > 8 and len(notebooks) > 9


@pytest.mark.parametrize('nb', [nb for nb in notebooks if module_of(nb)], ids=lambda nb: nb.name)
def test_exported_cells_import_lower_numbers_only(nb):
    assert {m: layer[m] for m in imports(exported(nb)) if layer[m] >= int(nb.name[:2])} == {}


@pytest.mark.parametrize('nb', notebooks, ids=lambda nb: nb.name)
def test_notebook_is_clean(nb):
    assert nb.stat().st_size < 300_000
    ids = [c.get('id') for c in cells(nb)]
    assert all(ids) and len(set(ids)) == len(ids)
    assert all(c.get('execution_count') is None for c in cells(nb))


@pytest.mark.parametrize('module', modules, ids=lambda m: m.stem)
def test_module_is_exported_from_a_notebook(module):
    assert module.stem in layer or module.stem == 'all'


@pytest.mark.parametrize('module', modules, ids=lambda m: m.stem)
def test_functions_fit_one_glance(module):
    long = {n.name: n.end_lineno - n.body[0].lineno + 1 for n in ast.walk(ast.parse(module.read_text(encoding='utf-8')))
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.end_lineno - n.body[0].lineno + 1 > 20}
    assert long == {}


@pytest.mark.parametrize('module', modules, ids=lambda m: m.stem)
def test_no_undefined_or_unused_names(module):
    if module.stem == 'all': pytest.skip('nothing but star imports')
    run = subprocess.run([sys.executable, '-m', 'pyflakes', str(module)], capture_output=True, text=True)
    lines = module.read_text(encoding='utf-8').split('\n')
    found = [ln for ln in run.stdout.splitlines() if '#' not in lines[int(ln.split(':')[1]) - 1]]  # a comment says why it is imported
    assert found == []


def test_each_module_imports_alone():
    "In a new process each: what a notebook's other cells imported must not be needed. They share what others wrote, which is slow to import"
    failed = {}
    for m in modules:
        code = f'import sys, warnings; assert "s9_fastai" not in sys.modules; warnings.simplefilter("error", UserWarning); import s9_fastai.{m.stem}'
        p = server.Process(target=exec, args=(code,))
        p.start()
        p.join()
        if p.exitcode: failed[m.stem] = p.exitcode
    assert failed == {}


def public_symbols():
    for m in modules:
        mod = importlib.import_module(f's9_fastai.{m.stem}')
        for nm in getattr(mod, '__all__', []):
            o = getattr(mod, nm)
            if getattr(o, '__module__', None) == mod.__name__: yield pytest.param(o, id=f'{m.stem}.{nm}')


@pytest.mark.parametrize('o', list(public_symbols()))
def test_public_symbol_is_documented(o):
    assert inspect.isclass(o) or inspect.isfunction(o)
    if o.__name__.startswith('main_') or o.__name__ == 'encodes': return  # an entry point without parameters; a type-dispatched extension
    assert (inspect.getdoc(o) or '').strip(), 'no docstring'
    target = o.__init__ if inspect.isclass(o) and '__init__' in vars(o) and not is_dataclass(o) else o
    if inspect.isclass(o) and target is o and not is_dataclass(o): return  # its parameters are its parent's
    docs = docments(target)
    named = [k for k, p in inspect.signature(target).parameters.items() if k != 'self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    bare = [k for k in named if not docs.get(k)]
    assert bare == [], f'parameters without a comment: {bare}'


def test_nothing_speaks_of_one_machine():
    words = '|'.join(['/wor' + 'k/', '/tm' + 'p/', r'\.\./sha' + 'red', '/ro' + 'ot/', r'pypi\.o' + 'rg'])
    files = subprocess.run(['git', 'grep', '-lEI', words, '--', '.', ':!.ci/run'], cwd=root, capture_output=True, text=True).stdout.split()
    assert files == []


@pytest.mark.parametrize('module', modules, ids=lambda m: m.stem)
def test_lines_fit_the_screen(module):
    lines = module.read_text(encoding='utf-8').split('\n')
    assert [i for i, ln in enumerate(lines, 1) if len(ln) > 120 and '__all__' not in ln] == []
