"""Counts how the notebooks and modules are built: length of exported cells, prose and checks beside them, complexity.

    python tools/shape.py [FOLDER]     a table; FOLDER: a checkout of the repository, this one by default
"""
import ast
import json
import re
import sys
from pathlib import Path
from statistics import median

exported = re.compile(r'#\| *exporti?\b')


def cells(root):
    "Per notebook that exports: its cells as (kind, source)"
    for path in sorted((root/'nbs').glob('*.ipynb')):
        found = [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
        if any(exported.match(s) for _, s in found): yield path.stem, found


def is_code(source): return bool(public(source)) or bool(re.search(r'^(def|class|@)', source, re.M))


def public(source):
    "Public functions, classes and names that a cell defines"
    found = []
    for n in ast.parse(source).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): found.append(n.name)
        if isinstance(n, ast.Assign): found += [t.id for t in n.targets if isinstance(t, ast.Name)]
    return [nm for nm in found if not nm.startswith('_')]


def count(notebook):
    "(lines, prose cells, checks, is bare, public symbols) for each exported cell with code"
    rows, prose = [], 0
    for kind, source in notebook:
        if kind == 'markdown': prose += 1
        elif not exported.match(source):
            if rows and '#| hide' not in source: rows[-1][2] += len(re.findall(r'^\s*(?:assert|test_|with ExceptionExpected)', source, re.M))
        elif is_code(source):
            rows.append([len(source.splitlines()) - 1, prose, 0, prose == 0, len(public(source))])
            prose = 0
    return rows


def complexity(path):
    from mccabe import PathGraphingAstVisitor  # not needed to count cells
    visitor = PathGraphingAstVisitor()
    visitor.preorder(ast.parse(path.read_text(encoding='utf-8')), visitor)
    return {f'{path.stem}.{g.entity}': g.complexity() for g in visitor.graphs.values()}


def levels(root):
    "How many modules import one another in the longest chain"
    package = root/'s9_fastai'
    names = {'.'.join(p.relative_to(package).with_suffix('').parts): p for p in package.rglob('*.py') if p.name[0] != '_' and p.stem != 'all'}
    def deps(nm):
        for n in ast.walk(ast.parse(names[nm].read_text(encoding='utf-8'))):
            if not isinstance(n, ast.ImportFrom) or not n.level: continue
            base = '.'.join([*nm.split('.')[:-n.level], *(n.module or '').split('.')]).strip('.')
            yield from ({base} | {f'{base}.{a.name}' for a in n.names}) & names.keys()
    def depth(nm): return 1 + max(map(depth, deps(nm)), default=0)
    return {nm: depth(nm) for nm in names}, {nm: len(p.read_text(encoding='utf-8').splitlines()) for nm, p in names.items()}


def main():
    root = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).resolve().parent.parent)
    rows = [r for _, nb in cells(root) for r in count(nb)]
    depth, lines = levels(root)
    found = {k: v for p in (root/'s9_fastai').rglob('*.py') if p.name[0] != '_' for k, v in complexity(p).items()}
    raises = sum(len(re.findall(r'^\s*raise ', p.read_text(encoding='utf-8'), re.M)) for p in (root/'s9_fastai').rglob('*.py'))
    worst = max(found, key=found.get)
    for what, value in {
            'modules': len(lines), 'lines of modules': f'{sum(lines.values())}, at most {max(lines.values())}', 'import levels': max(depth.values()),
            'exported cells': len(rows), 'their lines': f'median {median(r[0] for r in rows)}, at most {max(r[0] for r in rows)}',
            'prose cells for each': f'{sum(r[1] for r in rows)/len(rows):.1f}', 'checks for each': f'{sum(r[2] for r in rows)/len(rows):.1f}',
            'without prose before them': sum(r[3] for r in rows), 'with several public symbols': sum(r[4] > 1 for r in rows),
            'functions of complexity above 10': sum(v > 10 for v in found.values()), 'the most complex': f'{worst}, {found[worst]}',
            'lines for each raise': round(sum(lines.values())/raises)}.items(): print(f'{what:34}{value}')


if __name__ == '__main__': main()
