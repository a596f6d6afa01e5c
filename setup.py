"Every value comes from settings.ini: edit there, not here"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read_string((here/'settings.ini').read_text(encoding='utf-8'))
cfg = ini['DEFAULT']
lib = cfg['lib_path']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license_expression=cfg['license'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={nm: cfg[f'{nm}_requirements'].split() for nm in ('dev', 'timm', 'onnx', 'optuna')},
    packages=find_packages(str(here), include=[lib, f'{lib}.*']), package_data={lib: ['assets/*', 'py.typed']},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']})
