"""The options of an engine that concern memory, load and waiting."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from foredraft.cache.blocks import BLOCK, num_blocks
from foredraft.core.contracts import Target
from foredraft.core.errors import UserError, check_count, plain_scalar, shown

DEFAULT_NUM_SEQS = 8

MAX_NUM_SEQS = 4096
"""Upper limit of `max_num_seqs`."""

MAX_ROWS = 512
"""`max_num_batched_tokens` of an `Engine` without a plan. More rows do not make prompts faster, and others wait longer."""

_SHARE = 0.25
"""Largest share of the free memory that keys and values take unless the user says otherwise."""

_MOST = 1 << 50
"""Largest number of bytes that can be named."""


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine does at once, and how long requests wait. Names are those of vLLM where it has the option.

    Attributes:
        max_num_seqs: maximum number of outputs decoded at once; others wait. None is `DEFAULT_NUM_SEQS`.
        max_num_batched_tokens: maximum number of rows of a step: prompt tokens, roots and nodes of trees. For None, `LLM`
            measures on this machine how many rows take about a second.
        kv_cache_memory_bytes: memory for the keys and values of target and drafter, in bytes. None is `max_num_seqs` full
            contexts, but at most a quarter of the free memory.
        enable_prefix_caching: whether requests share the keys and values of equal prefixes.
        reproducible: whether every request keeps its number of tree nodes, whatever the load. Its tokens then do not depend on
            other requests. If the config leaves the number open, it is the one that pays with `max_num_seqs` running
            requests, or with one for None. Requests with a seed of their own always keep it.
        max_waiting: maximum number of outputs that wait for a place; None sets no limit.
        max_wait_s: an output that waits longer for its first step ends with ``error``, in seconds; None sets no limit.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value has a wrong type.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    reproducible: bool = False
    max_waiting: int | None = None
    max_wait_s: float | None = None

    def __post_init__(self) -> None:
        limits = {
            "max_num_seqs": (MAX_NUM_SEQS, "more prompts wait for their turn"),
            "max_num_batched_tokens": (1 << 20, "a step that long would keep every request waiting"),
            "kv_cache_memory_bytes": (_MOST, "no machine has more memory"),
            "max_waiting": (_MOST, "no memory holds more requests"),
        }
        for name, (most, why) in limits.items():
            object.__setattr__(self, name, check_count(name, getattr(self, name), most, why))
        for name in ("enable_prefix_caching", "reproducible"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        wait = plain_scalar(self.max_wait_s)
        if wait is not None and (isinstance(wait, bool) or not isinstance(wait, int | float) or not wait > 0):
            raise UserError(f"max_wait_s must be a number of seconds above 0, got {shown(wait)}")

    @property
    def num_seqs(self) -> int:
        """`max_num_seqs`, or its default."""
        return self.max_num_seqs or DEFAULT_NUM_SEQS


@dataclass(frozen=True)
class Memory:
    """What the keys and values of an engine may take.

    Attributes:
        num_blocks: number of blocks.
        block_bytes: bytes of a block, of target and drafter.
        max_model_len: maximum length of prompt plus output, in tokens.
    """

    num_blocks: int
    block_bytes: int
    max_model_len: int

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all blocks."""
        return self.num_blocks * self.block_bytes

    def __str__(self) -> str:
        tokens = self.num_blocks * BLOCK
        full, size = self.num_blocks / num_blocks(self.max_model_len), self.num_bytes / 2**20
        digits = 1 if size < 10 else 0
        means = f"{tokens} tokens, or {full:.1f} times the longest request of {self.max_model_len} tokens"
        return f"keys and values take at most {size:.{digits}f} MiB: {means}"


def memory_of(options: EngineOptions, target: Target, drafted_bytes: int, max_model_len: int, ahead: int) -> Memory:
    """Returns how many blocks an engine has. Nothing is allocated.

    Args:
        drafted_bytes: bytes of the keys and values of the drafters for one token.
        ahead: number of positions behind a request that a step may write.

    Raises:
        ValueError: the memory does not hold a single request.
    """
    per_token = target.new_pool(0).bytes_per_token + drafted_bytes
    block_bytes = BLOCK * per_token
    wanted = num_blocks(max_model_len + ahead, options.num_seqs)
    if options.kv_cache_memory_bytes is not None:
        count = options.kv_cache_memory_bytes // block_bytes
        least = num_blocks(1 + ahead)
        if count < least:
            raise UserError(
                f"kv_cache_memory_bytes {options.kv_cache_memory_bytes} holds {count} blocks of {BLOCK} tokens "
                f"({block_bytes} bytes each), but a step of a single request needs {least}",
                f"give at least {least * block_bytes}",
            )
        return Memory(count, block_bytes, max_model_len)
    return Memory(min(wanted, max(1, int(_SHARE * free_bytes(target.device)) // block_bytes)), block_bytes, max_model_len)


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        names: Any = os.sysconf_names
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
