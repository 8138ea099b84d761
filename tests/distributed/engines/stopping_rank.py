"""Two ranks in a window of microbatches, of which one stops: run by test_stopping.py."""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from nitp_ops.objectives import ModelInfo, Streams, build

how = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=10))
objective = build("ntp + nitp", model=ModelInfo(hidden_size=8, vocab_size=16, num_layers=4))
streams = Streams(token_ids=torch.ones(2, 5, dtype=torch.int64))
objective.count(streams).all_reduce()
counts = objective.count(streams)
if dist.get_rank() == 1:
    if how == "exits":
        os._exit(3)
    if how == "hangs":
        time.sleep(60)
(counts + objective.count(streams)).all_reduce()
dist.destroy_process_group()
