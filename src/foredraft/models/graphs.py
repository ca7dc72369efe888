"""Runs forwards of fixed shape as CUDA graphs.

In a step of a small tree, launching the kernels takes longer than running them. A step whose shape recurs is therefore
captured as one graph and replayed.

A shape consists of a number of requests, a width and a length. The width is the number of new nodes of the widest tree, rounded
up to a power of two. The length is that of the longest request, rounded up to a multiple of `LENGTH_STEP`.

Inputs have fixed addresses, and every step copies into them. Padding nodes follow the nodes of a tree. They see position 0
only, their outputs are never read, and their keys and values are written to block 0, which no request holds. The blocks of the
requests are an input too, so a graph serves all requests.
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

from foredraft.cache.blocks import BLOCK
from foredraft.cache.layout import Layout, additive, index_of
from foredraft.cache.pool import KVPool
from foredraft.core.contracts import Scores
from foredraft.core.tree import Ids

LENGTH_STEP = 256
"""Lengths are rounded up to a multiple of this number of positions."""

MAX_WIDTH = 64
"""Most new nodes of a tree that runs as a graph. Wider steps, such as prompts, keep the GPU busy without a graph."""

MAX_GRAPHS = 128
"""Number of graphs that are kept. The least recently used graph is dropped first."""

SEEN_BEFORE = 2
"""Number of times that a shape runs before it is captured. Capturing costs as much as a few forwards."""

_WORD, _NUMBERS = 8, 5
"""Bytes of an integer, and integers of a node."""

Masks = Mapping[int | None, Tensor | None]
Compute = Callable[[Layout, KVPool, Masks, Sequence[int], Tensor | None], Scores]
"""Computes the scores of all new nodes. The last argument holds an input vector for each new node if the model takes one. The
call has no side effect but the keys and values that it writes."""

Capture = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Runs a function. Returns its result, and a function that computes the result again into the same tensors."""


class Shape(NamedTuple):
    """Key of a graph: steps with equal values share one. `place` is the address and the shape of the pool's memory."""

    requests: int
    width: int
    length: int
    feature_layers: tuple[int, ...]
    place: tuple[int, ...]


@dataclass
class Graph:
    """One captured forward.

    Attributes:
        inputs: input of a step as bytes: numbers and blocks of a `Layout`, then the visible positions of every query.
        layout: a layout in which every tree is as wide as the widest. Its numbers and blocks are views of `inputs`.
        given: input vectors of a step, or None if the model takes none.
        outputs: the scores, or None before the capture.
        run: computes `outputs` again.
    """

    inputs: UInt8[Tensor, " bytes"]
    layout: Layout
    given: Tensor | None
    outputs: Scores | None = None
    run: Callable[[], None] = lambda: None


@dataclass
class Graphs:
    """The captured forwards of one model, by shape.

    Args:
        compute: the forward.
        capture: `cuda_capture()`, or a substitute without a GPU.
        group: number of query heads that share a key head. A mask has a row for each of them.
        dtype: dtype of the masks.
        windows: windows of the attention layers. Each window has its own mask.
        seen_before: number of times that a shape runs before it is captured.
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
        """Runs a step as a graph.

        Returns:
            Logits of the new nodes, or of the packed nodes `rows`, and features of all new nodes. None if no graph serves the
            step: it is too wide, or its shape has not run often enough.
        """
        if layout.width > MAX_WIDTH:
            return None
        width = 1 << (layout.width - 1).bit_length()
        length = -(-(layout.length + width) // LENGTH_STEP) * LENGTH_STEP
        shape = Shape(len(layout.lengths), width, length, tuple(feature_layers), (pool.kv.data_ptr(), *pool.kv.shape))
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
        """Makes the graph of a shape that ran often enough, else counts the shape and returns None."""
        if self._seen.setdefault(shape, 0) < self.seen_before:
            self._seen[shape] += 1
            return None
        if len(self._graphs) == MAX_GRAPHS:
            self._graphs.popitem(last=False)
        count, num_blocks = shape.requests * shape.width, shape.requests * shape.length // BLOCK
        size = _WORD * (_NUMBERS * count + num_blocks) + len(self.windows) * count * shape.length
        inputs = torch.zeros(size, dtype=torch.uint8, device=layout.device)
        numbers, blocks = _integers(inputs, _NUMBERS * count, num_blocks)
        given_there = {"device_numbers": numbers.view(_NUMBERS, -1), "device_blocks": blocks.view(shape.requests, -1)}
        unused = {
            "numbers": np.zeros((_NUMBERS, count), np.int64),
            "blocks": np.zeros((shape.requests, shape.length // BLOCK), np.int64),
            "new": np.arange(count),
            "visible": np.zeros((shape.requests, 0, 0), bool),
        }
        sizes = {"count": count, "width": shape.width, "length": shape.length}
        fixed = replace(layout, first_block=None, first_place=None, **given_there, **unused, **sizes)
        graph = Graph(inputs, fixed, None if given is None else given.new_zeros(count, given.shape[1]))
        self._graphs[shape] = graph
        return graph

    def _run(self, graph: Graph, pool: KVPool, feature_layers: Sequence[int]) -> Scores:
        """Runs the forward on the inputs of `graph`."""
        fixed, masks = replace(graph.layout), {}  # computes what it derives from the inputs in the graph, not before
        seen = graph.inputs[_WORD * (_NUMBERS * fixed.count + fixed.table.numel()) :].view(torch.bool)
        for window, part in zip(self.windows, seen.view(len(self.windows), -1, fixed.width, fixed.length), strict=True):
            masks[window] = additive(part, self.dtype).repeat(1, 1, self.group, 1)
        return self.compute(fixed, pool, masks, feature_layers, graph.given)

    def _bytes(self, layout: Layout, width: int, length: int) -> UInt8[np.ndarray, " bytes"]:
        """Returns the inputs of a graph of this width and length."""
        requests = len(layout.lengths)
        numbers = np.zeros((_NUMBERS, requests, width), np.int64)
        numbers[2], numbers[3] = np.arange(requests)[:, None], np.arange(width)
        numbers[:, layout.numbers[2], layout.numbers[3]] = layout.numbers
        blocks = np.zeros((requests, length // BLOCK), np.int64)
        blocks[:, : layout.blocks.shape[1]] = layout.blocks
        seen = np.zeros((len(self.windows), requests, width, length), bool)
        seen[..., 0] = True
        for part, window in zip(seen, self.windows, strict=True):
            part[:, : layout.width, : layout.length] = layout.seen(window)
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in (numbers, blocks, seen)])


def _integers(inputs: UInt8[Tensor, " bytes"], *sizes: int) -> Sequence[Tensor]:
    """Returns views of the first integers of `inputs`, in parts of these sizes."""
    return inputs[: _WORD * sum(sizes)].view(torch.int64).split(sizes)


def copied(table: Tensor, index: slice | Tensor) -> Tensor:
    """Returns a copy of some rows of an output that the next graph may overwrite."""
    return table[index].clone() if isinstance(index, slice) else table[index]


def cuda_capture() -> Capture:
    """Returns a function that captures CUDA graphs, which share scratch memory.

    Sharing is safe because graphs run one after another and their outputs are copied at once. When no graph is alive, the
    shared memory cannot be used again, so the next graph starts new memory.
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
            for _ in range(2):  # libraries make plans on their first calls, which must not be captured
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            outputs = run()
        living.add(graph)
        return outputs, graph.replay

    return capture
