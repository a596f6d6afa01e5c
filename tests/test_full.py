"The whole of CIFAR-10, as a user would train on it; minutes long, so only with -m slow"
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

root = Path(__file__).resolve().parent.parent
theirs = pd.read_csv(root/'tests'/'data'/'s9-log.csv')

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.environ.get('S9_CIFAR10'), reason='S9_CIFAR10 does not name the full CIFAR-10')]


def test_the_first_epoch_is_as_good_as_the_experiments(tmp_path):
    "With the recipe of the log, whose dropout is lower than that of the document"
    cmd = [Path(sys.executable).with_name('s9_train'), '--recipe', 'logged', '--epochs', '1', '--out', str(tmp_path/'run')]
    run = subprocess.run(cmd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    log, ours = (tmp_path/'run'/'log.txt').read_text(), pd.read_csv(tmp_path/'run'/'history.csv')
    assert 100*ours.valid_accuracy[0] > theirs.test_correct[0]/100 - 5
    assert re.search(r'Batch_id=390 ', log) and re.search(r'Accuracy: \d+/10000 ', log) and 'Learning rate: 0.05\n' in log
    assert run.stdout.count('\n') == 8, 'a pipe gets the folder, one line an epoch and six at the end'
