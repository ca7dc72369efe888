"""Splits a forward whose trees differ much in width, such as trees of a few nodes beside chunks of prompts.

Trees that run together are padded to the widest of them. With a chunk of 2,048 tokens, 63 trees of one node would be padded to
131,072 rows. Such trees run in several forwards instead, each over consecutive trees of similar width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from foredraft.cache.layout import Layout
from foredraft.cache.pool import KVCache, KVPool
from foredraft.core.contracts import Scores
from foredraft.core.tree import Ids, TreeBatch

Forward = Callable[[KVPool, Layout, Ids | None], Scores]
"""Runs the new nodes of a layout in a pool. Returns the logits of some packed nodes, or of all new nodes."""


def in_groups(
    forward: Forward, batch: TreeBatch, caches: Sequence[KVCache], rows: Ids | None, start: Sequence[int] | None, extra: int
) -> Scores:
    """Runs `forward` on groups of trees of similar width, and joins the scores. They are those of one forward over all trees.

    Args:
        rows: packed nodes whose logits are returned, in any order. None means all new nodes.
        start: number of nodes at the start of each tree that were run before.
        extra: number of padding rows that cost about as much as one more forward, which reads all weights again.
    """
    pool = caches[0].pool
    widths = np.diff(batch.offsets) - (0 if start is None else np.asarray(start, np.int64))
    groups = groups_of(widths, extra)
    if len(groups) == 1:
        return forward(pool, pool.behind(batch, caches, start), rows)
    found, order = list[Scores](), list[int]()
    for group in groups:
        if not widths[group].any():
            continue
        begin, end = batch.bounds[group.start], batch.bounds[group.stop]
        mine = None
        if rows is not None:
            places = np.flatnonzero((begin <= rows) & (rows < end))
            mine = rows[places] - begin
            order += places.tolist()
        layout = pool.behind(_part(batch, group), caches[group], None if start is None else start[group])
        found.append(forward(pool, layout, mine))
    logits = torch.cat([scores.logits for scores in found])
    if order != sorted(order):
        logits = logits[torch.from_numpy(np.argsort(order)).to(logits.device)]
    features = [scores.features for scores in found if scores.features is not None]
    return Scores(logits, torch.cat(features) if features else None)


def groups_of(widths: Ids, extra: int) -> list[slice]:
    """Splits trees into consecutive groups with the least sum of rows, padding included, and `extra` for each group.

    Trees of equal width stay together.
    """
    count = len(widths)
    if count * widths.max() - widths.sum() <= extra:  # all padding costs less than a second group
        return [slice(0, count)]
    costs, first = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    for end in range(1, count + 1):  # finds the last group of the first `end` trees
        widest = np.maximum.accumulate(widths[:end][::-1])[::-1]
        sums = costs[:end] + widest * np.arange(end, 0, -1) + extra
        first[end] = sums.argmin()
        costs[end] = sums[first[end]]
    groups = [slice(int(first[count]), count)]
    while groups[0].start:
        groups.insert(0, slice(int(first[groups[0].start]), groups[0].start))
    return groups


def _part(batch: TreeBatch, group: slice) -> TreeBatch:
    """Returns consecutive trees as a batch, without draft laws, which no target reads."""
    nodes = slice(batch.bounds[group.start], batch.bounds[group.stop])
    columns = {name: getattr(batch, name)[nodes] for name in ("tokens", "parents", "drawn")}
    offsets = batch.offsets[group.start : group.stop + 1] - batch.offsets[group.start]
    return replace(batch, **columns, draft_row=np.full_like(columns["drawn"], -1), offsets=offsets)
