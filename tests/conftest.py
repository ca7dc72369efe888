"""Keeps torch to one thread per test process, so that tests run alike on every machine."""

import torch

torch.set_num_threads(1)
