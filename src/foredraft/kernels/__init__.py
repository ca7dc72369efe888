"""Kernels: the arithmetic of the fast paths, in C for several instruction sets, each beside a plain version in torch."""

from __future__ import annotations

from foredraft.kernels.sets import KERNELS as KERNELS
from foredraft.kernels.sets import Code as Code
from foredraft.kernels.sets import compiled_for as compiled_for
from foredraft.kernels.sets import cpu_flags as cpu_flags
from foredraft.kernels.sets import kernels as kernels
from foredraft.kernels.sets import library as library
