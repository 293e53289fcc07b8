"""One thread for all tests: their models are tiny, and a process that a test starts must compute the same bits."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
