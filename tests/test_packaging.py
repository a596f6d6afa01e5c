"One home for each fact about the package"
from configparser import ConfigParser
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points, requires, version
from pathlib import Path

try: import tomllib
except ModuleNotFoundError: import tomli as tomllib  # Python 3.10; pytest brings it

import pytest
import torch
import yaml

import s9_fastai

root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read_string((root/'settings.ini').read_text(encoding='utf-8'))
cfg = ini['DEFAULT']
pyproject = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))


def test_version_has_one_source(): assert s9_fastai.__version__ == version('s9_fastai') == cfg['version']


def test_pyproject_holds_no_metadata():
    assert set(pyproject) == {'build-system', 'tool'} and set(pyproject['tool']) == {'nbdev', 'ruff', 'mypy'}
    nbdev = pyproject['tool']['nbdev']
    assert nbdev['lib_path'] == cfg['lib_path'] and nbdev['put_version_in_init'] is False


def test_commands_exist():
    for ep in entry_points(group='console_scripts'):
        if ep.value.startswith('s9_fastai'): assert callable(ep.load())
    assert {ep.name for ep in entry_points(group='console_scripts')} >= {line.split('=')[0] for line in cfg['console_scripts'].split()}


def test_requirements_are_those_of_settings():
    assert len([r for r in requires('s9_fastai') if 'extra' not in r]) == len(cfg['requirements'].split())


def test_albumentations_is_the_last_one_under_mit(): assert 'albumentations==2.0.8' in cfg['requirements'].split()


@pytest.mark.skipif('PYTEST_XDIST_WORKER' not in os.environ, reason='only one process')
def test_each_worker_has_its_own_threads(): assert torch.get_num_threads() == int(os.environ['OMP_NUM_THREADS'])


def test_changelog_and_citation_have_the_version():
    versions = re.findall(r'^## \[(.+?)\] - (?:Unreleased|\d{4}-\d\d-\d\d)$', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    citation = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert versions[0] == citation['version'] == cfg['version']
    assert {'cff-version', 'message', 'title', 'authors'} <= set(citation), 'the fields that the format demands'
    assert citation['title'] == cfg['lib_name'] and citation['license'] == cfg['license'] and citation['abstract'] == cfg['description']
    assert citation['authors'] == [{'name': cfg['author']}] and citation['keywords'] == cfg['keywords'].split()


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'benchmarks/README.md', 'benchmarks/LOG.md'])
def test_relative_links_lead_to_files(name):
    links = re.findall(r'\]\(([^)\s]+)\)', (root/name).read_text(encoding='utf-8'))
    paths = [ln.split('#')[0] for ln in links if not re.match('[a-z]+:|#', ln)]
    assert [p for p in paths if not (root/name).parent.joinpath(p).exists()] == []


def test_lowest_versions_are_those_of_settings():
    out = subprocess.run([sys.executable, root/'tools'/'lowest.py'], capture_output=True, text=True, check=True).stdout.split()
    lower = [r for r in cfg['requirements'].split() if '=' in r]
    assert [o.split('==')[0] for o in out] == [re.split('[=<>~!]', r)[0] for r in lower]
    assert all(r.startswith((o, o.replace('==', '>='))) for o, r in zip(out, lower))


def test_a_build_has_the_data_and_py_typed(tmp_path):
    "What a wheel would hold: each file of assets/, and the marker for type checkers"
    pytest.importorskip('setuptools')
    cmd = [sys.executable, 'setup.py', '-q', 'build', '--build-base', tmp_path, 'build_py', '--build-lib', tmp_path/'lib']
    subprocess.run(cmd, cwd=root, capture_output=True, check=True)
    def files(top): return {p.relative_to(top) for p in (top/'s9_fastai').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert files(tmp_path/'lib') == files(root) and Path('s9_fastai/py.typed') in files(root)
