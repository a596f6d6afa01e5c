"""Checks the types of the package with mypy, each `@patch` function as the method of its class that it becomes.

    python tools/types.py    print mypy's errors, with the lines of the modules; exit with 1 if there are any

mypy does not run a module, so it cannot see the methods that fastcore's `patch` adds. A copy of the package is checked in which they
stand in their classes; everything else in it is the same.
"""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

root = Path(__file__).resolve().parent.parent
kinds = {'as_prop': '@property', 'cls_method': '@classmethod'}


def patched(n):
    "(class name, decorator of the method or None) of a function with `@patch`; None for any other node"
    if not isinstance(n, ast.FunctionDef): return None
    for d in n.decorator_list:
        call = d if isinstance(d, ast.Call) else None
        if not (isinstance(f := call.func if call else d, ast.Name) and f.id == 'patch'): continue
        if not isinstance(cls := n.args.args[0].annotation, ast.Name): return None
        return cls.id, next((kinds[k.arg] for k in (call.keywords if call else ()) if k.arg in kinds), None)
    return None


def as_method(lines, n, decorator):
    "The lines of function `n`, as (number, text), as a method"
    own = next(i for i in range(n.lineno - 1, n.end_lineno) if lines[i].startswith('def '))
    rest = [f'    {lines[i]}' for i in range(own, n.end_lineno)]
    rest[0] = re.sub(r'\(cls:\w+', '(cls', rest[0])
    head = [(own, f'    {decorator}')] if decorator else []
    return [*head, *((own + 1 + i, o) for i, o in enumerate(rest))]


def with_methods(text):
    "`text` as lines (number, text), its patched functions moved into the classes of the same module"
    lines, body = text.splitlines(), ast.parse(text).body
    classes = {n.name: n.end_lineno for n in body if isinstance(n, ast.ClassDef) and n.body[0].lineno > n.lineno}
    moves = [(n, *patched(n)) for n in body if patched(n) and patched(n)[0] in classes]
    gone = {i for n, *_ in moves for i in range(n.decorator_list[0].lineno, n.end_lineno + 1)}
    methods = {classes[cls]: [] for _, cls, _ in moves}
    for n, cls, decorator in moves: methods[classes[cls]] += as_method(lines, n, decorator)
    out = []
    for i, line in enumerate(lines, 1):
        if i not in gone: out.append((i, line))
        out += methods.get(i, [])
    return out


def main():
    with TemporaryDirectory() as tmp:
        shutil.copytree(root/'s9_fastai', Path(tmp)/'s9_fastai', ignore=shutil.ignore_patterns('__pycache__', 'assets'))
        numbers = {}
        for path in Path(tmp).rglob('*.py'):
            found = with_methods(path.read_text(encoding='utf-8'))
            path.write_text('\n'.join(o for _, o in found) + '\n', encoding='utf-8')
            numbers[path.relative_to(tmp).as_posix()] = [i for i, _ in found]
        done = subprocess.run([sys.executable, '-m', 'mypy', '--config-file', root/'pyproject.toml', 's9_fastai'], cwd=tmp, text=True, capture_output=True)
    for line in done.stdout.splitlines():
        place = re.match(r'(s9_fastai/\S+\.py):(\d+):', line)
        print(f'{place[1]}:{numbers[place[1]][int(place[2]) - 1]}:{line[place.end():]}' if place else line)
    sys.exit(done.stderr or done.returncode)


if __name__ == '__main__': main()
