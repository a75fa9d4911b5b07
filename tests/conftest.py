"""One thread for torch, here and in all processes that tests start: on matrices as small as theirs, more threads mostly
wait for each other. What OMP_NUM_THREADS says already stands."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
