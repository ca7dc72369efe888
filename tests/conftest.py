"""What every test needs: one thread per process, so that tests run alike on every machine, and a cache of their own."""

import os
import tempfile

import torch

torch.set_num_threads(1)
os.environ["FOREDRAFT_CACHE"] = tempfile.mkdtemp(prefix="foredraft-tests-")  # nothing measured by a test outlives it
