"The command makes the same network with the workers of each of multiprocessing's start methods"
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from s9_fastai.core.weights import read_tensors

pytestmark = pytest.mark.slow  # each worker process of `spawn` imports all that the command does


def train(folder, workers, method=None):
    "The weights that `s9_train` ends with; `method` is set as a user would who has another system or another version of Python"
    folder.mkdir()
    if method: (folder/'sitecustomize.py').write_text(f'import multiprocessing\nmultiprocessing.set_start_method({method!r})\n')
    args = '--data sample --epochs 2 --n-channels 4 --policy reference --augment item --seed 1'.split()
    done = subprocess.run([Path(sys.executable).with_name('s9_train'), *args, '--workers', str(workers), '--out', folder/'run'], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), *filter(None, [os.environ.get('PYTHONPATH')])])})
    assert done.returncode == 0, done.stderr
    return read_tensors(folder/'run'/'weights.safetensors')[0]


@pytest.fixture(scope='module')
def alone(tmp_path_factory): return train(tmp_path_factory.mktemp('start')/'alone', 0)


@pytest.mark.parametrize('method', multiprocessing.get_all_start_methods())
def test_workers_of_each_start_method(alone, tmp_path, method):
    weights = train(tmp_path/method, 2, method)
    assert len(weights) == len(alone) > 9 and all(v.equal(alone[k]) for k, v in weights.items())
