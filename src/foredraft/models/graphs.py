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
from jaxtyping import UInt8
from torch import Tensor

from foredraft.cache import KVPool, Layout, additive, index_of
from foredraft.protocols import Scores
from foredraft.tree import Ids

LENGTH_STEP = 256
"""Masks and attention reach over so many positions more than needed, at most."""

MAX_WIDTH = 64
"""Wider steps, prompts above all, keep the card busy without a graph."""

MAX_GRAPHS = 128
"""Graphs kept, the latest used ones."""

SEEN_BEFORE = 2
"""Capturing costs a few forwards: a shape is captured when it comes for the third time."""

_ROW = 6 * 8
"""Bytes of the numbers of a node."""

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
    """One captured forward.

    Attributes:
        inputs: what a step gives it, as bytes: the numbers of a `Layout`, and what every query sees.
        layout: every tree as wide as the widest; its numbers lie in `inputs`.
        given: the vectors that a step gives it, where the model takes such.
        run: computes `outputs` anew.
    """

    inputs: UInt8[Tensor, " bytes"]
    layout: Layout
    given: Tensor | None
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
        windows: of attention, a mask each.
        seen_before: how often a shape has to come before it is captured.
    """

    compute: Compute
    capture: Capture
    group: int
    dtype: torch.dtype
    windows: Sequence[int | None] = (None,)
    seen_before: int = SEEN_BEFORE
    _graphs: OrderedDict[Shape, Graph] = field(default_factory=OrderedDict)
    _seen: dict[Shape, int] = field(default_factory=dict)

    def __call__(
        self,
        layout: Layout,
        pool: KVPool,
        feature_layers: Sequence[int] = (),
        given: Tensor | None = None,
        *,
        rows: Ids | None = None,
    ) -> Scores | None:
        """Logits of the new nodes, or of the packed nodes `rows`, and features of all; None where the shape is wide, or has not
        come often enough."""
        first = layout.slots[0]
        if layout.width > MAX_WIDTH or layout.slots != list(range(first, first + len(layout.slots))):
            return None  # slots apart are gathered by indices that a graph cannot hold
        width = 1 << (layout.width - 1).bit_length()
        length = -(-(layout.length + width) // LENGTH_STEP) * LENGTH_STEP
        pool.reserve(length)
        shape = Shape(tuple(layout.slots), width, length, tuple(feature_layers), (pool.kv.data_ptr(), *pool.kv.shape))
        graph = self._graphs.get(shape) or self._new(shape, layout, given)
        if graph is None:
            return None
        self._graphs.move_to_end(shape)
        graph.inputs.copy_(torch.from_numpy(self._bytes(layout, width, length)))
        mine = layout.numbers[2] * width + layout.numbers[3]
        there = index_of(mine, layout.device)
        if graph.given is not None and given is not None:
            graph.given[there] = given
        if graph.outputs is None:
            graph.outputs, graph.run = self.capture(lambda: self._run(graph, pool, shape.feature_layers))
        graph.run()
        assert graph.outputs is not None
        logits, features = graph.outputs
        asked = there if rows is None else index_of(mine[np.searchsorted(layout.new, rows)], layout.device)
        return Scores(copied(logits, asked), None if features is None else copied(features, there))

    def _new(self, shape: Shape, layout: Layout, given: Tensor | None) -> Graph | None:
        """Room for a shape that came often enough."""
        if self._seen.setdefault(shape, 0) < self.seen_before:
            self._seen[shape] += 1
            return None
        if len(self._graphs) == MAX_GRAPHS:
            self._graphs.popitem(last=False)
        slots, count = len(shape.slots), len(shape.slots) * shape.width
        size = _ROW * count + len(self.windows) * count * shape.length
        inputs = torch.zeros(size, dtype=torch.uint8, device=layout.device)
        numbers = inputs[: _ROW * count].view(torch.int64).view(-1, count)
        unused = {"numbers": np.zeros((6, count), np.int64), "new": np.arange(count), "visible": np.zeros((slots, 0, 0), bool)}
        sizes = {"count": count, "width": shape.width, "length": shape.length}
        fixed = replace(layout, lying=numbers, first_place=None, **sizes, **unused)
        graph = Graph(inputs, fixed, None if given is None else given.new_zeros(count, given.shape[1]))
        self._graphs[shape] = graph
        return graph

    def _run(self, graph: Graph, pool: KVPool, feature_layers: Sequence[int]) -> Scores:
        """The forward on what `graph` was given."""
        fixed, masks = graph.layout, {}
        seen = graph.inputs[_ROW * fixed.count :].view(torch.bool)
        for window, part in zip(self.windows, seen.view(len(self.windows), -1, fixed.width, fixed.length), strict=True):
            masks[window] = additive(part, self.dtype).repeat(1, 1, self.group, 1)
        return self.compute(fixed, pool, masks, feature_layers, graph.given)

    def _bytes(self, layout: Layout, width: int, length: int) -> UInt8[np.ndarray, " bytes"]:
        """What a graph of this width and length is given. Padding is written behind the trees, where nothing is kept."""
        slots = np.asarray(layout.slots)[:, None]
        numbers = np.zeros((6, len(slots), width), np.int64)
        numbers[2], numbers[3] = np.arange(len(slots))[:, None], np.arange(width)
        numbers[4], numbers[5] = slots, np.asarray(layout.ends)[:, None] + np.arange(width)
        numbers[:, layout.numbers[2], layout.numbers[3]] = layout.numbers
        seen = np.zeros((len(self.windows), len(slots), width, length), bool)
        seen[..., 0] = True
        for part, window in zip(seen, self.windows, strict=True):
            part[:, : layout.width, : layout.length] = layout.seen(window)
        return np.concatenate([one.reshape(-1).view(np.uint8) for one in (numbers, seen)])


def copied(table: Tensor, index: slice | Tensor) -> Tensor:
    """Rows of what the next graph may write over."""
    return table[index].clone() if isinstance(index, slice) else table[index]


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
