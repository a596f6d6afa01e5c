"""README.md is nbs/index.ipynb as Markdown: hidden cells and directives left out, pictures beside it in nbs/images,
with the words of `#| fig-alt: ...` for those who cannot see them.

    python tools/readme.py            write README.md
    python tools/readme.py --check    exit with 1 if README.md is not what the notebook gives
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent


def shown(cells):
    "The `cells` that a reader sees, without the lines that speak to nbdev; of a `hide_input` cell the outputs alone"
    for c in cells:
        lines = re.match(r'(#\|[^\n]*\n?)*', c.source)[0]
        directives = lines.replace('#|', '').split()
        if 'hide' in directives: continue
        c.source = c.source[len(lines):]
        c.metadata['transient'] = {'remove_source': 'hide_input' in directives}
        c.metadata['alt'] = re.findall(r'fig-alt: (.+)', lines)
        if c.source: yield c


def render():
    "The README's text, and its pictures as bytes by file name"
    nb = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    nb.cells = list(shown(nb.cells))
    text, resources = MarkdownExporter().from_notebook_node(nb, {'unique_key': 'readme', 'output_files_dir': 'nbs/images'})
    for alt in sum((c.metadata['alt'] for c in nb.cells), []): text = text.replace('![png]', f'![{alt}]', 1)
    text = re.sub(r'\]\((?=images/|[\w.]+\.ipynb)', '](nbs/', text).replace('](../', '](')  # links, seen from here
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', resources['outputs']


def main():
    text, pictures = render()
    files = {root/'README.md': text.encode(), **{root/name: data for name, data in pictures.items()}}
    if '--check' in sys.argv:
        stale = [f.name for f, data in files.items() if not f.is_file() or f.read_bytes() != data]
        sys.exit(f'stale: {", ".join(stale)}; run python tools/readme.py' if stale else 0)
    for f, data in files.items():
        f.parent.mkdir(exist_ok=True)
        f.write_bytes(data)


if __name__ == '__main__': main()
