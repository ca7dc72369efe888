"""Forwards of fixed shape: on CUDA a step of a small tree costs the launches of its kernels more than their work, so that
steps whose shapes come again are captured as one graph each, and replayed.

A shape is which slots take part, the number of new nodes of the widest tree rounded up to a power of two, and the length of
the longest slot rounded up to `LENGTH_STEP`. Inputs live in tensors that stay where they are; every step copies into them.
Padding nodes are nodes behind the tree that see nothing but position 0; nobody reads what they give.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from foredraft.cache import KVPool, Layout
from foredraft.protocols import Scores

LENGTH_STEP = 256
"""Masks and attention reach over so many positions more than needed, at most."""

MAX_WIDTH = 64
"""Wider steps, prompts above all, keep the card busy without a graph."""

MAX_GRAPHS = 64
"""Graphs kept, the latest used ones."""

SEEN_BEFORE = 2
"""Capturing costs a few forwards: a shape is captured when it comes for the third time."""

Masks = Mapping[int | None, Tensor | None]
Compute = Callable[[Layout, KVPool, Masks, Sequence[int], Tensor | None], Scores]
"""Scores of all new nodes, of which the last argument gives a vector each where the model takes such; a pure function of
tensors, apart from the keys and values that it writes."""

Capture = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Runs something; gives its result, and what computes it again into the same place."""


class Shape(NamedTuple):
    """What two steps must share to be one graph; `place` is where the pool's memory begins, and its sizes."""

    slots: tuple[int, ...]
    width: int
    length: int
    feature_layers: tuple[int, ...]
    place: tuple[int, ...]


@dataclass
class Graph:
    """One captured forward: its inputs, its outputs, and what runs it."""

    layout: Layout
    masks: dict[int | None, Tensor]
    given: Tensor | None = None
    outputs: Scores | None = None
    run: Callable[[], None] = lambda: None


@dataclass
class Graphs:
    """The captured forwards of one model.

    Args:
        compute: the forward.
        capture: `cuda_capture()`, or a stand-in where there is no card.
        group: query heads that share a key head; a mask has a row for each.
        dtype: of masks.
        seen_before: how often a shape has to come before it is captured.
    """

    compute: Compute
    capture: Capture
    group: int
    dtype: torch.dtype
    seen_before: int = SEEN_BEFORE
    _graphs: OrderedDict[Shape, Graph] = field(default_factory=OrderedDict)
    _seen: dict[Shape, int] = field(default_factory=dict)

    def __call__(
        self, layout: Layout, pool: KVPool, masks: Masks, feature_layers: Sequence[int], given: Tensor | None = None
    ) -> Scores | None:
        """Logits and features of the new nodes; None where the shape is wide, or has not come often enough."""
        first = layout.slots[0]
        if layout.width > MAX_WIDTH or layout.slots != list(range(first, first + len(layout.slots))):
            return None  # slots apart are gathered by indices that a graph cannot hold
        width = 1 << (layout.width - 1).bit_length()
        length = -(-(layout.length + width) // LENGTH_STEP) * LENGTH_STEP
        pool.reserve(length)
        shape = Shape(tuple(layout.slots), width, length, tuple(feature_layers), (pool.kv.data_ptr(), *pool.kv.shape))
        graph = self._graphs.get(shape) or self._new(shape, layout, pool, masks, given)
        if graph is None:
            return None
        self._graphs.move_to_end(shape)
        load(graph, layout, masks, given)
        graph.run()
        mine = layout.request * width + layout.column
        assert graph.outputs is not None
        logits, features = graph.outputs
        return Scores(logits[mine], None if features is None else features[mine])

    def _new(self, shape: Shape, layout: Layout, pool: KVPool, masks: Masks, given: Tensor | None) -> Graph | None:
        if self._seen.setdefault(shape, 0) < self.seen_before:
            self._seen[shape] += 1
            return None
        if len(self._graphs) == MAX_GRAPHS:
            self._graphs.popitem(last=False)
        graph = self._graphs[shape] = self._room_for(shape, layout, masks, given)
        load(graph, layout, masks, given)
        arguments = graph.layout, pool, graph.masks, shape.feature_layers, graph.given
        graph.outputs, graph.run = self.capture(lambda: self.compute(*arguments))
        return graph

    def _room_for(self, shape: Shape, layout: Layout, masks: Masks, given: Tensor | None) -> Graph:
        """Empty inputs: every tree as wide as the widest, every mask there."""
        count, device = len(shape.slots) * shape.width, layout.token_ids.device
        names = ("token_ids", "positions", "slot", "place", "request", "column")
        ids = {name: torch.zeros(count, dtype=torch.int64, device=device) for name in names}
        unused = {"new": np.arange(count), "visible": np.zeros((len(shape.slots), 0, 0), bool), "first_place": None}
        fixed = replace(layout, **ids, **unused, count=count, width=shape.width, length=shape.length)
        size = len(shape.slots), 1, self.group * shape.width, shape.length
        rooms = {window: torch.empty(size, dtype=self.dtype, device=device) for window in masks}
        return Graph(fixed, rooms, None if given is None else given.new_zeros(count, given.shape[1]))


def load(graph: Graph, layout: Layout, masks: Masks, given: Tensor | None) -> None:
    """Copies a step's inputs to where the graph reads them."""
    fixed = graph.layout
    slots, width, device = len(fixed.slots), fixed.width, fixed.place.device
    slot, end = torch.tensor([layout.slots, layout.ends], device=device)[:, :, None]
    fixed.slot.view(slots, width)[:] = slot
    fixed.place.view(slots, width)[:] = end + torch.arange(width, device=device)  # of padding; nothing is kept there
    fixed.token_ids.zero_()
    fixed.positions.zero_()
    for name in ("token_ids", "positions", "place"):
        getattr(fixed, name).view(slots, width)[layout.request, layout.column] = getattr(layout, name)
    if graph.given is not None and given is not None:
        graph.given.zero_()
        graph.given.view(slots, width, -1)[layout.request, layout.column] = given
    for window, whole in graph.masks.items():
        given = masks[window]
        by_head = whole.view(slots, -1, width, fixed.length)
        by_head.fill_(-torch.inf)
        by_head[..., 0] = 0.0
        part = by_head[:, :, : layout.width, : layout.length]
        part.copy_(torch.zeros_like(part) if given is None else given.view(part.shape))


def cuda_capture() -> Capture:
    """Captures CUDA graphs that share scratch memory: they run one after another, and what they give is copied at once.

    Memory that the last graph has left cannot be shared again: what comes after it gets another.
    """
    living: WeakSet[Any] = WeakSet()
    memory = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        nonlocal memory
        if not living:
            memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries plan on their first calls, which must not be captured
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            outputs = run()
        living.add(graph)
        return outputs, graph.replay

    return capture
