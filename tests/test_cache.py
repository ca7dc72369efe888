"""The pool of keys and values, and where a step reads and writes in it, against naive references."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from foredraft.bench.run import peak_bytes
from foredraft.cache.blocks import BLOCK, Blocks, OutOfBlocksError, num_blocks
from foredraft.cache.layout import Layout, lay_out
from foredraft.cache.pool import PREFILL_CHUNK, KVCache, KVPool, prefill
from foredraft.core.tree import TreeBatch
from foredraft.models.table import TableTarget, random_law

CPU = torch.device("cpu")
LAYERS, HEADS, DIM = 2, 3, 4

BUSHY = [-1, 0, 0, 1, 0, 2, 2, 5]


def new_pool(blocks: int) -> KVPool:
    return KVPool(blocks, num_layers=LAYERS, num_heads=HEADS, head_dim=DIM, dtype=torch.float64, device=CPU)


def trees(*shapes: list[int]) -> TreeBatch:
    """Trees of these parents whose tokens are all different."""
    numbers = iter(range(100, 200))
    return TreeBatch.chains([[next(numbers) for _ in parents] for parents in shapes], shapes)


def chain(length: int) -> list[int]:
    return list(range(-1, length - 1))


def run(
    pool: KVPool, batch: TreeBatch, caches: list[KVCache], start: list[int] | None = None, seed: int = 0
) -> tuple[Layout, Tensor]:
    """Writes random keys and values [2, L, M, H, D] for the new nodes, as a forward does."""
    layout = pool.behind(batch, caches, start)
    shape = 2, LAYERS, len(layout.new), HEADS, DIM
    written = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for layer in range(LAYERS):
        pool.write(layer, layout, written[0, layer], written[1, layer])
    return layout, written


def contents(cache: KVCache) -> Tensor:
    """What a cache holds, [2, L, T, H, D]."""
    places = [cache.place(position) for position in range(cache.length)]
    return cache.pool.kv.flatten(3, 4)[:, :, :, places].transpose(2, 3).clone()


def test_bytes_of_a_token() -> None:
    pool = new_pool(5)
    assert pool.bytes_per_token == 2 * LAYERS * HEADS * DIM * 8
    pool.allocate().reserve(5 * BLOCK)
    assert pool.kv.nbytes == pool.bytes_per_token * 6 * BLOCK  # block 0 is for padding


def filled(pool: KVPool, length: int, seed: int = 0) -> KVCache:
    cache = pool.allocate()
    if length:
        run(pool, trees(chain(length)), [cache], seed=seed)
        pool.keep([cache], [range(1, length)])
    return cache


def test_blocks_are_given_out_once_and_come_back() -> None:
    pool = new_pool(3)
    caches = [pool.allocate() for _ in range(3)]
    for cache in caches:
        cache.reserve(1)
        cache.reserve(BLOCK)
    assert sorted(block for cache in caches for block in cache.blocks) == [1, 2, 3] and not pool.blocks.num_free
    with pytest.raises(OutOfBlocksError, match="2 blocks of 32 tokens are needed, but 0 of 3 are free"):
        caches[0].reserve(2 * BLOCK + 1)
    assert len(caches[0].blocks) == 1
    taken = list(caches[1].blocks)
    pool.free(caches[1])
    assert pool.blocks.num_free == 1 and not caches[1].blocks
    caches[2].reserve(BLOCK + 1)
    assert caches[2].blocks[1:] == taken


def test_kept_blocks_are_reused_last_and_the_least_recent_first() -> None:
    blocks, forgotten = Blocks(6), list[int]()
    blocks.forget = forgotten.append
    first, second = blocks.take(2), blocks.take(2)
    for block in [*first, second[0]]:
        blocks.keep(block)
    blocks.release(second)
    blocks.release(first)
    assert blocks.num_free == 6 and not forgotten
    blocks.share([second[0]])  # found again
    assert blocks.num_free == 5 and blocks.num_holders(second[0]) == 1
    assert {*blocks.take(3)} == {*range(1, 7)} - {*first, second[0]} and not forgotten
    assert blocks.take(2) == forgotten == first[::-1], "the end of a prefix before its beginning"
    blocks.release([second[0]])
    assert blocks.take(1) == [second[0]] and forgotten[2:] == [second[0]]


def test_truncate_forgets_the_end() -> None:
    pool = new_pool(1)
    cache = filled(pool, 5)
    before = contents(cache)
    cache.truncate(5)
    cache.truncate(2)
    assert cache.length == 2 and torch.equal(contents(cache), before[:, :, :2])
    for length in (3, -1):
        with pytest.raises(ValueError, match=f"2 tokens to {length}"):
            cache.truncate(length)


def test_blocks_need_no_memory_before_they_are_written() -> None:
    pool, memory = KVPool(1 << 19, LAYERS, HEADS, DIM, torch.float64, CPU), peak_bytes(CPU)
    assert pool.kv.nbytes > 1 << 32
    cache, other = filled(pool, 5), filled(pool, 3, seed=1)
    before = contents(cache), contents(other)
    cache.reserve(5000)
    assert max(cache.blocks) < pool.kv.shape[3] and not contents(cache)[:, :, cache.length :].any()
    assert torch.equal(contents(cache), before[0]) and torch.equal(contents(other), before[1])
    assert peak_bytes(CPU) - memory < 1 << 28


PATHS = [[[]], [[1]], [[2, 5, 7]], [[], [4]], [[2, 6], [], [1, 3]], [[4], [2, 5, 7], [2, 5], [1]]]


@pytest.mark.parametrize("context", [0, 1, 6])
@pytest.mark.parametrize("paths", PATHS)
def test_keep_is_node_0_and_the_path(paths: list[list[int]], context: int) -> None:
    """Ragged paths over contexts of different lengths; a bystander is left alone."""
    pool = new_pool(2 * len(paths) + 1)
    bystander = filled(pool, 4, seed=50)
    caches = [filled(pool, context + b, seed=b) for b in range(len(paths))][::-1]
    expected = [contents(bystander)]
    batch = trees(*[BUSHY] * len(paths))
    before = [contents(cache) for cache in caches]
    _, written = run(pool, batch, caches, seed=99)
    for b, path in enumerate(paths):
        nodes = batch.offsets[b] + np.array([0, *path])
        expected.append(torch.cat([before[b], written[:, :, nodes]], dim=2))
    pool.keep(caches, paths)
    for cache, wanted in zip([bystander, *caches], expected, strict=True):
        assert cache.length == wanted.shape[2] and torch.equal(contents(cache), wanted)


@pytest.mark.parametrize("order", [[0], [2], [0, 1, 2], [1, 2], [2, 0], [0, 2]])
def test_reading_gives_what_was_written(order: list[int]) -> None:
    """Consecutive blocks and scattered ones, one request and several, within a block and over several."""
    pool = new_pool(8)
    caches = [filled(pool, length, seed=length) for length in (1, 2, 19)]
    some = [caches[i] for i in order]
    batch = trees(*([[-1], BUSHY, [-1, 0, 0]][: len(some)]))
    before = [contents(cache) for cache in some]
    caches[0].reserve(BLOCK + 1)  # not consecutive
    layout, written = run(pool, batch, some, seed=9)
    for layer in range(LAYERS):
        key, value = pool.read(layer, layout)
        assert key.shape == value.shape == (len(order), HEADS, layout.length, DIM)
        for b, cache in enumerate(some):
            nodes = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
            wanted = torch.cat([before[b], written[:, :, nodes]], dim=2)[:, layer]
            assert torch.equal(key[b, :, : wanted.shape[1]], wanted[0].transpose(0, 1))
            assert torch.equal(value[b, :, : wanted.shape[1]], wanted[1].transpose(0, 1))
            assert wanted.shape[1] == cache.length + batch[b].num_nodes <= layout.length


Shapes = list[list[int]]

layouts = pytest.mark.parametrize(
    ("shapes", "lengths", "start"),  # parents per request, lengths of their caches, nodes that were run before
    [
        ([[-1]], [0], [0]),
        ([[-1]], [3], [0]),
        ([chain(3)], [0], [0]),
        ([BUSHY], [4], [0]),
        ([[-1], BUSHY], [5, 0], [0, 0]),
        ([BUSHY, chain(3), [-1]], [2, 7, 0], [0, 0, 0]),
        ([BUSHY], [4], [5]),
        ([BUSHY, chain(3), [-1, 0, 0]], [2, 7, 0], [3, 0, 2]),
        ([chain(3), BUSHY], [6, 1], [3, 7]),
    ],
)


def cached(lengths: list[int]) -> list[KVCache]:
    pool = new_pool(3 * len(lengths))
    caches = [filled(pool, length) for length in lengths]
    for cache in caches:
        cache.reserve(cache.length + len(BUSHY))
    return caches


@layouts
def test_where_nodes_go(shapes: Shapes, lengths: list[int], start: list[int]) -> None:
    batch, caches = trees(*shapes), cached(lengths)
    layout = lay_out(batch, caches, None if not any(start) else start, CPU)
    expected = []
    for b, (first, length) in enumerate(zip(batch.offsets[:-1], lengths, strict=True)):
        for node in range(start[b], len(shapes[b])):
            token, depth = batch.tokens[first + node], batch[b].depths[node]
            expected.append((token, length + depth, first + node, b, node - start[b], caches[b].place(length + node)))
    columns = (layout.token_ids, layout.positions, layout.new, layout.request, layout.column, layout.place)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    for row, cache in zip(layout.table.tolist(), caches, strict=True):
        assert [block for block in row if block] == cache.blocks[: len(row)]
    assert layout.width == max(len(p) - s for p, s in zip(shapes, start, strict=True))
    assert layout.length == max(len(p) + n for p, n in zip(shapes, lengths, strict=True))
    assert layout.rows_of(layout.new[::-1].copy()).tolist() == list(range(len(expected)))[::-1]


def may_see(parents: list[int], length: int, node: int, place: int, window: int | None) -> bool:
    """Brute force: the context and the node's ancestors, less than `window` positions away."""
    path, at = [], node
    while at >= 0:
        path.append(at)
        at = parents[at]
    distances = {length + one: above for above, one in enumerate(path)}
    distances |= {one: length - one + len(path) - 1 for one in range(length)}
    return place in distances and (window is None or distances[place] < window)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 1000])
@layouts
def test_the_mask_is_context_and_ancestors_within_the_window(
    shapes: Shapes, lengths: list[int], start: list[int], window: int | None
) -> None:
    """A window counts depth: equal for siblings, whatever their number."""
    layout = lay_out(trees(*shapes), cached(lengths), start, CPU)
    mask = layout.mask(torch.float64, CPU, window)
    if mask is None:
        mask = torch.zeros(len(shapes), 1, layout.width, layout.length, dtype=torch.float64)
    assert mask.shape == (len(shapes), 1, layout.width, layout.length)
    assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
    for b, parents in enumerate(shapes):
        for column, node in enumerate(range(start[b], len(parents))):
            seen = [may_see(parents, lengths[b], node, place, window) for place in range(layout.length)]
            assert (mask[b, 0, column] == 0).tolist() == seen
    assert (mask == 0).any(-1).all(), "a row that sees nothing gives NaN"


@pytest.mark.parametrize(
    ("shapes", "lengths", "window", "needs_mask"),
    [
        ([[-1]], [0], None, False),
        ([[-1]], [9], 10, False),
        ([[-1]], [9], 9, True),
        ([[-1], [-1]], [9, 9], None, False),
        ([[-1], [-1]], [9, 8], None, True),
        ([[-1, 0]], [9], None, True),
    ],
)
def test_no_mask_where_everything_is_seen(shapes: Shapes, lengths: list[int], window: int | None, needs_mask: bool) -> None:
    mask = lay_out(trees(*shapes), cached(lengths), None, CPU).mask(torch.float32, CPU, window)
    assert (mask is not None) == needs_mask


@layouts
def test_padding_there_and_back(shapes: Shapes, lengths: list[int], start: list[int]) -> None:
    layout = lay_out(trees(*shapes), cached(lengths), start, CPU)
    states = torch.arange(1.0, 1 + len(layout.new) * HEADS * DIM).view(-1, HEADS, DIM)
    padded = layout.pad(states)
    assert padded.shape == (len(shapes), layout.width, HEADS, DIM)
    done = 0
    for b, parents in enumerate(shapes):
        rows = len(parents) - start[b]
        assert torch.equal(padded[b, :rows], states[done : done + rows]) and not padded[b, rows:].any()
        done += rows
    assert torch.equal(layout.unpad(padded.flatten(2)), states.flatten(1))


@pytest.mark.parametrize("parts", [[0, 8], [0, 1, 8], [0, 3, 5, 8]])
def test_a_tree_in_parts_is_the_tree_at_once(parts: list[int]) -> None:
    """Nodes, parents of later nodes among them, run in several passes beside a request that is done at once."""
    pool = new_pool(4)
    caches = [filled(pool, 2), filled(pool, 3, seed=1)]
    whole = lay_out(trees(BUSHY), caches[:1], None, CPU)
    written = []
    for first, last in pairwise(parts):
        batch = trees(BUSHY[:last], [-1, 0])
        layout, new = run(pool, batch, caches, [first, 0 if last == parts[1] else 2], seed=last)
        mine = layout.request == 0
        written.append(new[:, :, mine])
        rows = slice(first, last)
        np.testing.assert_array_equal(layout.visible[0, : last - first, : 2 + last], whole.visible[0, rows, : 2 + last])
        assert layout.positions[mine].tolist() == whole.positions[rows].tolist()
    before = contents(caches[0])
    pool.keep(caches, [[2, 5, 7], [1]])
    wanted = torch.cat([before, torch.cat(written, dim=2)[:, :, [0, 2, 5, 7]]], dim=2)
    assert torch.equal(contents(caches[0]), wanted) and caches[1].length == 5


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("lengths", [[], [0], [1], [3, 0, 1], [PREFILL_CHUNK + 2, PREFILL_CHUNK, 2 * PREFILL_CHUNK + 1]])
def test_prefill_in_chunks(lengths: list[int], scored: bool) -> None:
    law = random_law(2, 0)
    target = TableTarget(lambda prefix: law(prefix[-3:]), 2)
    pool = target.new_pool(sum(map(num_blocks, lengths)))
    caches = [pool.allocate() for _ in lengths]
    prompts = [[(b + i // 3) % 2 for i in range(length)] for b, length in enumerate(lengths)]
    found = prefill(target, caches, prompts, scored=scored)
    held = [[int(pool.kv[0, 0, 0].view(-1)[cache.place(i)]) for i in range(cache.length)] for cache in caches]
    assert held == prompts
    assert target.num_forwards == -(-max(lengths, default=0) // PREFILL_CHUNK)
    for prompt, chunks in zip(prompts, found, strict=True):
        rows = torch.cat([scores.logits for scores in chunks]).exp().numpy() if chunks else np.zeros((0, 2))
        assert len(rows) == (len(prompt) if scored else 0)
        for i, row in enumerate(rows):
            np.testing.assert_allclose(row, law(tuple(prompt[: i + 1][-3:])), atol=1e-15)


def test_a_pool_is_one_tensor() -> None:
    """A captured forward runs again on a pool whose tensor lies where that of a pool that is gone did; it may know no other."""
    pool = KVPool(2, num_layers=1, num_heads=3, head_dim=4, dtype=torch.float32, device=torch.device("cpu"))
    pool.allocate().reserve(8)
    assert [name for name, value in vars(pool).items() if isinstance(value, torch.Tensor)] == ["kv"]
