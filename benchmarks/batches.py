"""Measures batches of requests, plain and speculative: time of a step, tokens per second, peak memory, and cache moves.

    python benchmarks/batches.py --output benchmarks/results/batches-14m.jsonl
    python benchmarks/batches.py --model build/chat-350m --output benchmarks/results/batches-350m.jsonl

The first round is a warm-up, in which the caches grow from nothing. The peak memory is measured in it, above the memory of the
loaded models. In later rounds the methods take turns on other prompts. The first step of a round, which runs the prompts, is
not counted. Neither are steps in which a request has already ended. The moved bytes are the keys and values of accepted nodes
that `keep` moves to another place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from time import perf_counter
from typing import Any

from measuring import LAWS, arguments, drafting, held_bytes, median, read_prompts, report, rotated, rounded, rounds, synchronize

from foredraft import LLM
from foredraft.bench.run import peak_bytes
from foredraft.cache.pool import KVPool
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.progress import progress_bar

METHODS = ("ar", "lm:dyspec:8", "auto")
COLUMNS = (
    *("batch", "method", "sampling", "tree", "budget", "step_ms", "tokens_per_step", "tokens_per_s"),
    *("peak_mib", "moved_bytes_per_step", "moved_nodes_per_step"),
)


def moved_nodes(paths: Sequence[Sequence[int]]) -> int:
    """Counts the nodes of the accepted paths that change their place when they are kept."""
    return sum(node != place for path in paths for place, node in enumerate(path, start=1))


def node_bytes(pool: KVPool) -> int:
    """Computes the bytes of the keys and values of one node: 2 * layers * heads * head size * size of an entry."""
    two, layers, heads, _, _, head_dim = pool.kv.shape
    return two * layers * heads * head_dim * pool.kv.element_size()


@dataclass
class Moved:
    """Nodes and bytes that all pools moved since the last `take`."""

    nodes: int = 0
    bytes: int = 0

    def take(self) -> tuple[int, int]:
        """Returns nodes and bytes, and resets both."""
        found = self.nodes, self.bytes
        self.nodes = self.bytes = 0
        return found


@contextmanager
def counted_moves() -> Iterator[Moved]:
    """Counts the moves of every `KVPool.keep` in a block."""
    moved, keep = Moved(), KVPool.keep

    def run(self: KVPool, caches: Sequence[Any], paths: Sequence[Sequence[int]]) -> None:
        nodes = moved_nodes(paths)
        moved.nodes += nodes
        moved.bytes += nodes * node_bytes(self)
        keep(self, caches, paths)

    KVPool.keep = run  # type: ignore[method-assign]
    try:
        yield moved
    finally:
        KVPool.keep = keep  # type: ignore[method-assign]


@dataclass(eq=False)
class Method:
    """One method at one batch size and sampling, and its measurements."""

    name: str
    law: str
    batch: int
    llm: LLM
    peak: int = 0
    steps: list[dict[str, float]] = field(default_factory=list)

    def run(self, prompts: Sequence[list[int]], num_tokens: int) -> list[dict[str, float]]:
        """Generates for a batch, and returns its steps after the first in which all requests take part."""
        sampling = replace(LAWS[self.law], max_tokens=num_tokens, ignore_eos=True)
        engine, found, size = self.llm.engine, [], 0
        requests = [engine.add_request(None, prompt, replace(sampling, seed=i)) for i, prompt in enumerate(prompts)]
        with counted_moves() as moved:
            began = perf_counter()
            while engine.has_unfinished_requests():
                running = engine.step()
                synchronize(self.llm.target.device)
                seconds, (nodes, moved_bytes) = perf_counter() - began, moved.take()
                before, size = size, sum(len(request.sequences[0].token_ids) for request in requests)
                if before and len(running) == len(requests):
                    found.append({"seconds": seconds, "tokens": size - before, "nodes": nodes, "bytes": moved_bytes})
                began = perf_counter()
        return found

    def row(self) -> dict[str, Any]:
        """Makes a row of the measurements, with memory in MiB."""
        sums = {name: sum(step[name] for step in self.steps) for name in self.steps[0]}
        chosen = self.llm.drafting(LAWS[self.law])
        return rounded(
            {
                "batch": self.batch,
                "method": self.name,
                "sampling": self.law,
                **{name: chosen[name] for name in ("tree", "budget")},
                "num_steps": len(self.steps),
                "step_ms": 1000 * median([step["seconds"] for step in self.steps]),
                "tokens_per_step": sums["tokens"] / len(self.steps) / self.batch,
                "tokens_per_s": sums["tokens"] / sums["seconds"],
                "peak_mib": self.peak / 2**20,
                "moved_bytes_per_step": sums["bytes"] / len(self.steps),
                "moved_nodes_per_step": sums["nodes"] / len(self.steps),
            }
        )


def config_of(name: str, draft_model: str) -> dict[str, Any]:
    """Returns the speculative config of a method's name."""
    if name == "ar":
        return {"method": "ar"}
    if name == "auto":
        return {"method": "auto", "model": draft_model}
    _, tree, nodes = name.split(":")
    return drafting(draft_model, tree, int(nodes))


def warm_up(methods: Sequence[Method], prompts: Sequence[list[int]], num_tokens: int, advance: Callable[[int], None]) -> None:
    """Runs the first round, and measures each method's peak memory above the memory that is held before it."""
    for method in methods:
        device = method.llm.target.device
        base = held_bytes(device)
        method.run(prompts, num_tokens)
        method.peak = peak_bytes(device) - base
        advance(1)


def measure(methods: Sequence[Method], plan: Sequence[Sequence[list[int]]], num_tokens: int, minutes: float) -> None:
    """Runs all rounds of one batch size."""
    with progress_bar(f"batch of {methods[0].batch}", len(plan) * len(methods)) as advance:
        warm_up(methods, plan[0], num_tokens, advance)
        for number in rounds(len(plan) - 1, minutes):
            for method in rotated(methods, number):
                method.steps += method.run(plan[1 + number], num_tokens)
                advance(1)


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, minutes=3.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes")
    parser.add_argument("--laws", nargs="+", choices=list(LAWS), default=["0", "1"], help="samplings, by name")
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds after the warm-up")
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()
    rows, device = [], None
    for size in args.batches:
        plain = LLM(args.model or BUNDLED_TARGET, {"method": "ar"}, dtype=args.dtype, device=args.device, max_num_seqs=size)
        prompts = read_prompts(plain, size + args.rounds)
        plan = [prompts[first : first + size] for first in range(args.rounds + 1)]
        methods = [  # each has caches of its own
            Method(name, law, size, plain.with_speculation(config_of(name, args.draft_model)))
            for name, law in product(METHODS, args.laws)
        ]
        measure(methods, plan, args.max_tokens, args.minutes / len(args.batches))
        rows += [method.row() for method in methods]
        device = plain.target.device
    assert device is not None
    report(args.output, rows, COLUMNS, device=device, dtype=args.dtype)


if __name__ == "__main__":
    main()
