"""As many tests at a time as there are cores, each with one thread; and the table of faults: each test of a fault shows the message that a user
gets, and the table has it word for word"""
import gc
import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

tables = Path(__file__).parent/'data'/'faults'


def pytest_addoption(parser):
    parser.addoption('--write-faults', action='store_true', help='write the messages that users get into tests/data/faults, instead of comparing them')


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    "For `-n auto`: the cores that this process may use; each worker takes about a gigabyte of memory"
    return min(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1, 8)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the option
def pytest_cmdline_main(config):
    if config.option.write_faults: config.option.numprocesses = None  # each writes into the tables, so one at a time


def pytest_configure(config):
    "One thread for torch in every worker, and in the commands that tests start: else they would wait for each other"
    if getattr(config.option, 'numprocesses', None): os.environ.setdefault('OMP_NUM_THREADS', '1')


def pytest_collection_finish(session):
    "What takes a twentieth of the time: the garbage collector goes over all modules again and again; torch notes the stack of each seed for a GPU"
    gc.freeze()
    for nm in {'torch.cuda', 'torch.xpu', 'torch.mtia'} & sys.modules.keys(): sys.modules[nm].traceback = SimpleNamespace(format_stack=list)


def own_words(text): return re.sub(r'\([^()]*\)', '()', text)  # in round brackets are the words of libraries, which change


@pytest.fixture
def fault(request, tmp_path):
    "A function of (group, fault, message) that compares the message with the table's row, or writes that row"
    def show(group, what, message):
        message = ' '.join(str(message).split()).replace(str(tmp_path), '…')
        assert message, 'a fault without a message'
        path, test = tables/f'{group}.json', request.node.nodeid.split('[')[0]
        table = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
        if request.config.getoption('--write-faults'):
            table[what] = dict(test=test, message=message)
            tables.mkdir(exist_ok=True)
            path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        row = table.get(what)
        assert row, f'no row {what!r} in {path.name}: run pytest --write-faults'
        assert (test, own_words(message)) == (row['test'], own_words(row['message'])), 'the table is old: run pytest --write-faults'
    return show


@contextmanager
def without_pictures():
    from s9_fastai.app import results
    with pytest.MonkeyPatch.context() as m:
        m.setattr(results, 'plot_curves', lambda history, path, lrs: path.touch())
        m.setattr(results, 'plot_misclassified', lambda learn, path: path.touch())
        m.setattr(results, 'write_page', lambda learn, folder, record, path, *args: path.touch())
        yield


@pytest.fixture
def no_pictures():
    "Runs in this process leave empty files in the place of pictures and report, which take seconds; test_train and test_report look at those"
    with without_pictures(): yield


@pytest.fixture(scope='module')
def no_pictures_in_module():
    "As `no_pictures`, for all tests of a module and for its own fixtures"
    with without_pictures(): yield
