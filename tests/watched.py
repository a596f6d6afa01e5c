"A process of a training without a network: it watches the others, and adds numbers with them until one is gone. The silence that counts is short"
import sys
import time

import torch
import torch.distributed as dist

from s9_fastai.core.ranks import rank_sum, this_rank
from s9_fastai.training import watch
from s9_fastai.training.distributed import _watched, process_group

watch.SILENT, watch.LOST = 2, 4

if __name__ == '__main__':
    with process_group(), _watched('s9_train --resume run'):
        assert rank_sum(torch.ones(1)) == dist.get_world_size()
        if this_rank() == 0: print('adding', flush=True)
        until = time.monotonic() + float(sys.argv[1])
        while rank_sum(torch.tensor(float(time.monotonic() < until))): time.sleep(0.05)
