"""The lowest version of each requirement in settings.ini that has a lower bound, in one line for pip. Needs Python alone.

    pip install -e '.[dev]' $(python tools/lowest.py)
"""
import re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def lowest(requirements):
    "`name==version` for each of `requirements` that says with >=, == or ~= what is the least, such as `torch>=2.10,<3`"
    for r in requirements:
        name, least = re.match(r'[\w.-]+', r)[0], re.search(r'[>=~]=([\w.]+)', r.split(';')[0])
        if least: yield f'{name}=={least[1].rstrip(".")}'


def main():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read_string((root/'settings.ini').read_text(encoding='utf-8'))
    print(*lowest(ini['DEFAULT']['requirements'].split()))


if __name__ == '__main__': main()
