"One home for each fact about the package"
from configparser import ConfigParser
import os
from importlib.metadata import entry_points, requires, version
from pathlib import Path

try: import tomllib
except ModuleNotFoundError: import tomli as tomllib  # Python 3.10; pytest brings it

import pytest
import torch

import s9_fastai

root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read_string((root/'settings.ini').read_text(encoding='utf-8'))
cfg = ini['DEFAULT']
pyproject = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))


def test_version_has_one_source(): assert s9_fastai.__version__ == version('s9_fastai') == cfg['version']


def test_pyproject_holds_no_metadata():
    assert set(pyproject) == {'build-system', 'tool'} and set(pyproject['tool']) == {'nbdev'}
    nbdev = pyproject['tool']['nbdev']
    assert nbdev['lib_path'] == cfg['lib_path'] and nbdev['put_version_in_init'] is False


def test_commands_exist():
    for ep in entry_points(group='console_scripts'):
        if ep.value.startswith('s9_fastai'): assert callable(ep.load())
    assert {ep.name for ep in entry_points(group='console_scripts')} >= {line.split('=')[0] for line in cfg['console_scripts'].split()}


def test_requirements_are_those_of_settings():
    assert len([r for r in requires('s9_fastai') if 'extra' not in r]) == len(cfg['requirements'].split())


def test_albumentations_is_the_last_one_under_mit(): assert 'albumentations>=2.0.8,<3' in cfg['requirements'].split()


@pytest.mark.skipif('PYTEST_XDIST_WORKER' not in os.environ, reason='only one process')
def test_each_worker_has_its_own_threads(): assert torch.get_num_threads() == int(os.environ['OMP_NUM_THREADS'])
