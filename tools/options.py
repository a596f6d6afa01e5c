"""s9_fastai/assets/options.json is what `s9_train` and `s9_summary` have for options, read from their functions and from `Recipe`.

    python tools/options.py            write it
    python tools/options.py --check    exit with 1 if it is not what the functions give
"""
import json
import sys

from s9_fastai.app.command import command_parser
from s9_fastai.app.options import STORED, option_table
from s9_fastai.app.run import option_values
from s9_fastai.app.train import NET_FIELDS, s9_summary, s9_train


def made():
    "The content of the file"
    parsers = [command_parser(s9_train, values=option_values()), command_parser(s9_summary, NET_FIELDS)]
    return json.dumps({p.prog: option_table(p) for p in parsers}, indent=1, ensure_ascii=False) + '\n'


def main():
    text = made()
    if '--check' not in sys.argv: STORED.write_text(text, encoding='utf-8')
    elif not STORED.is_file() or STORED.read_text(encoding='utf-8') != text:
        sys.exit(f'stale: {STORED.name}; run python tools/options.py')


if __name__ == '__main__': main()
