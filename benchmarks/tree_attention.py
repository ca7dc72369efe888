"""Measures attention over token trees, with and without the hidden blocks of the mask, for several orders of the nodes.

    python benchmarks/tree_attention.py --output benchmarks/results/tree-attention.jsonl

The measured layer is that of a 350M model (24 query heads that share 8 key heads of size 64), after a prefix of cached tokens.
Attention is computed in three ways:

- *dense* is torch's attention with an additive mask.
- *skipping* computes only the blocks of 32 x 32 in which a query attends to a key, one row of blocks at a time.
- *compiled* is the decoder of `foredraft.models.native`, which reads only the keys to which a row attends. Its time is that of
  a forward pass of one layer with minimal projections, minus the same with a window of one token.

Masks and lists of blocks are made once per step and are not timed. Times are medians over trees and repeats. Each way is called
once more before it is timed, since the threads of the way before may still be running.

Trees are random recursive trees (the parent of node i is any earlier node) and DySpec's trees. The bundled drafter grows the
latter at temperature 0.6 on training prompts. The insertion order is the order of the paper's heap, highest priority first.

Source: DySpec (arXiv 2410.11744), appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import arguments, median, report, rotated, rounded, rounds, synchronize
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM
from tree_shapes import ORDERS, all_trees, reordered

from foredraft.cache.blocks import num_blocks
from foredraft.core.progress import progress_bar
from foredraft.core.tree import DraftTree, TreeBatch, ancestor_mask
from foredraft.models.native import NativeTarget, can_run

BLOCK = 32
HEADS, KEY_HEADS, HEAD_DIM = 24, 8, 64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest allowed difference of outputs, which are means of standard normal values. bfloat16 has 8 bits of precision."""

COLUMNS = (
    *("trees", "nodes", "prefix", "dtype", "order", "tree_blocks", "blocks", "all_blocks"),
    *("dense_ms", "skipping_ms", "compiled_ms", "skipping_over_dense", "skipping_over_insertion"),
)


@dataclass(frozen=True, eq=False)
class Case:
    """Input of one attention layer.

    Attributes:
        query: queries [heads, nodes, size].
        key, value: keys and values [key heads, prefix + nodes, size].
        visible: whether each node attends to each key [nodes, prefix + nodes].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: np.ndarray

    @property
    def bias(self) -> Tensor:
        """Additive mask."""
        hidden = torch.from_numpy(~self.visible).to(self.query.device)
        return torch.zeros(hidden.shape, dtype=self.query.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def case_of(tree: DraftTree, prefix: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Makes random states for a tree after a prefix."""
    generator = torch.Generator().manual_seed(0)
    total = prefix + tree.num_nodes
    shapes = ((HEADS, tree.num_nodes), (KEY_HEADS, total), (KEY_HEADS, total))
    query, key, value = (torch.randn(*shape, HEAD_DIM, generator=generator).to(device, dtype) for shape in shapes)
    prompt = np.ones((tree.num_nodes, prefix), bool)
    return Case(query, key, value, np.concatenate([prompt, ancestor_mask(tree.parents)], axis=1))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Computes torch's attention. Query heads that share a key head become rows, as in `foredraft.models.llama`."""
    group, width = query.shape[0] // key.shape[0], query.shape[1]
    rows = query.reshape(1, key.shape[0], group * width, -1)
    out = F.scaled_dot_product_attention(rows, key[None], value[None], attn_mask=bias.repeat(group, 1)[None, None])
    return out.view(query.shape)


def dense(case: Case) -> Callable[[], Tensor]:
    """Returns a function that computes attention to every key, with the mask."""
    return partial(attend, case.query, case.key, case.value, case.bias)


def visible_blocks(visible: np.ndarray) -> np.ndarray:
    """Marks the blocks of 32 queries and 32 keys in which a query attends to a key."""
    rows, columns = (-(-size // BLOCK) for size in visible.shape)
    padded = np.zeros((rows * BLOCK, columns * BLOCK), bool)
    padded[: visible.shape[0], : visible.shape[1]] = visible
    return np.any(padded.reshape(rows, BLOCK, columns, BLOCK), axis=(1, 3))


def skipping(case: Case) -> Callable[[], Tensor]:
    """Returns a function that computes attention of each block of queries to its visible blocks of keys."""
    bias, plan = case.bias, []
    for number, blocks in enumerate(visible_blocks(case.visible)):
        rows = slice(number * BLOCK, (number + 1) * BLOCK)
        seen = np.flatnonzero(np.repeat(blocks, BLOCK)[: case.key.shape[1]])
        keys = torch.from_numpy(seen).to(case.key.device)
        plan.append((rows, keys, bias[rows][:, keys]))

    def run() -> Tensor:
        parts = [
            attend(case.query[:, rows], case.key.index_select(1, keys), case.value.index_select(1, keys), cut)
            for rows, keys, cut in plan
        ]
        return torch.cat(parts, dim=1)

    return run


class Compiled:
    """Forward passes of the compiled decoder, with one layer of minimal projections, with and without attention."""

    def __init__(self) -> None:
        weights = MistralForCausalLM(self.config(None)).state_dict()
        threads = torch.get_num_threads()
        self._models = [NativeTarget(self.config(window), weights, threads=threads) for window in (None, 1)]

    @staticmethod
    def config(window: int | None) -> Any:
        """Makes the configuration of the layer, with a window of attention."""
        return MistralConfig(
            hidden_size=BLOCK,
            intermediate_size=BLOCK,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            head_dim=HEAD_DIM,
            vocab_size=BLOCK,
            max_position_embeddings=4096,
            sliding_window=window,
            tie_word_embeddings=False,
        )

    def forwards(self, tree: DraftTree, prefix: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Returns a forward pass with attention and one without."""
        return self._forward(0, tree, prefix), self._forward(1, tree, prefix)

    def _forward(self, number: int, tree: DraftTree, prefix: int) -> Callable[[], Any]:
        model = self._models[number]
        pool = model.new_pool(num_blocks(prefix + tree.num_nodes))
        cache = pool.allocate()
        model.forward(TreeBatch.chains([[0] * prefix]), [cache], np.empty(0, np.int64))
        pool.keep([cache], [range(1, prefix)])
        batch = TreeBatch.chains([tree.tokens.tolist()], [tree.parents.tolist()])
        return partial(model.forward, batch, [cache], np.empty(0, np.int64))


@dataclass(eq=False)
class Point:
    """One kind of tree at one size, prefix, precision and order, and its measurements."""

    trees: str
    nodes: int
    prefix: int
    dtype: torch.dtype
    order: str
    tree_blocks: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, tree: DraftTree, compiled: Compiled | None, device: torch.device, repeats: int) -> None:
        """Times every way on one tree. The outputs of *dense* and *skipping* must agree."""
        tree = reordered(tree, ORDERS[self.order](tree))
        case = case_of(tree, self.prefix, self.dtype, device)
        ways: dict[str, Callable[[], Any]] = {"dense": dense(case), "skipping": skipping(case)}
        apart = float((ways["dense"]() - ways["skipping"]()).abs().max())
        assert apart < TOLERANCE[self.dtype], f"outputs differ by {apart}"
        if compiled is not None and self.dtype == torch.bfloat16:
            ways["compiled"], ways["without"] = compiled.forwards(tree, self.prefix)
        blocks = visible_blocks(case.visible)
        self.blocks.append(int(blocks.sum()))
        self.tree_blocks.append(int(blocks[:, self.prefix // BLOCK :].sum()))
        for name in rotated(list(ways), len(self.blocks)):
            for number in range(repeats + 1):
                synchronize(device)
                began = perf_counter()
                ways[name]()
                synchronize(device)
                if number:  # the first call is a warm-up
                    self.seconds.setdefault(name, []).append(perf_counter() - began)

    def row(self, insertion: Point) -> dict[str, Any]:
        """Makes a row of medians in milliseconds and of mean numbers of blocks."""
        found = {name: 1000 * median(seconds) for name, seconds in self.seconds.items()}
        both = "compiled" in found
        skipped, plain = found["skipping"], 1000 * median(insertion.seconds["skipping"])
        return rounded(
            {
                **{name: getattr(self, name) for name in ("trees", "nodes", "prefix", "order")},
                "dtype": str(self.dtype).removeprefix("torch."),
                "num_trees": len(self.blocks),
                "tree_blocks": float(np.mean(self.tree_blocks)),
                "blocks": float(np.mean(self.blocks)),
                "all_blocks": (self.nodes // BLOCK) * ((self.prefix + self.nodes) // BLOCK),
                "dense_ms": found["dense"],
                "skipping_ms": skipped,
                "compiled_ms": found["compiled"] - found["without"] if both else None,
                "compiled_forward_ms": found["compiled"] if both else None,
                "skipping_over_dense": found["dense"] / skipped,
                "skipping_over_insertion": plain / skipped,
            }
        )


def points(sizes: Sequence[int], prefixes: Sequence[int]) -> list[Point]:
    """Makes all points. A chain has only one order, since its nodes attend to all nodes before them."""
    return [
        Point(trees, nodes, prefix, dtype, order)
        for trees, nodes, prefix, dtype in product(("random", "dyspec", "chain"), sizes, prefixes, TOLERANCE)
        for order in (ORDERS if trees != "chain" else ["insertion"])
    ]


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, models=False, minutes=2.5)
    parser.add_argument("--nodes", type=int, nargs="+", default=[256, 512, 1024], help="numbers of nodes of the trees")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[128, 1024], help="numbers of cached tokens")
    parser.add_argument("--rounds", type=int, default=5, help="number of trees of each kind")
    parser.add_argument("--repeats", type=int, default=1, help="number of times that each way is timed on a tree")
    parser.add_argument("--threads", type=int, help="number of threads; 1 gives more stable times on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if any(size % BLOCK for size in (*args.nodes, *args.prefixes)):
        parser.error(f"--nodes and --prefixes must be multiples of {BLOCK}")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    compiled = Compiled() if can_run(Compiled.config(None), torch.bfloat16, device) else None
    trees, every = dict(all_trees(args.nodes, args.rounds)), points(args.nodes, args.prefixes)
    with progress_bar("measuring", args.rounds * len(every)) as advance:
        for number in rounds(args.rounds, args.minutes):
            for point in rotated(every, number):
                point.run(trees[point.trees, point.nodes][number], compiled, device, args.repeats)
                advance(1)
    first = {(point.trees, point.nodes, point.prefix, point.dtype): point for point in every if point.order == "insertion"}
    rows = [point.row(first[point.trees, point.nodes, point.prefix, point.dtype]) for point in every]
    report(args.output, rows, COLUMNS, device=device)


if __name__ == "__main__":
    main()
