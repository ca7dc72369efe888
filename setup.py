"""Builds the compiled kernels: one C file for each instruction set, all in one library. Everything else is in pyproject.toml.

Without a C compiler, the package installs without the library, and torch computes. An instruction set that the compiler does not
know is left out. The environment variable ``CC`` names the compiler.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from src.foredraft.kernels.build import COMMON, FLAGS, LINKED, SOURCES, builds_for, folder  # noqa: E402
