"""Compares requests of unequal lengths between two checkouts, and with a scheduler without overhead.

Before commit 2bfd306 the outputs of `LLM.generate` ran in waves: the next `max_num_seqs` began when the last of a wave had
ended. Each checkout runs in a process of its own, and they take turns at each workload; one sleeps while the other runs. In the
same turn the costs of forwards are measured, from which `ideal.py` computes the time of a scheduler without overhead. A pair
is the ratio of two times of one turn. The interval is that of the median of the pairs (bootstrap, 95 %). A turn during which
other processes used the processors is repeated, at most ``--tries`` - 1 times.

Decoding is plain and greedy, on random prompts of token ids. Lengths are log-uniform. Sorted means: the longest answer first.

    python benchmarks/waves.py --before CHECKOUT --model DIR --output FILE
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from ideal import CONTEXT, ideal_seconds, measured_costs
from revisions import HERE, PAUSE_S, Checkout, interval

NUM_SEQS, MAX_ROWS, MAX_LEN = 16, 512, 1280
"""Requests at once, the largest number of rows of a step, and a context that fits every request."""

WORKLOADS = {"mixed": ((16, 900), (8, 256)), "answers": ((16, 16), (8, 1024))}
"""The least and the largest numbers of tokens of prompts and of answers."""

ORDERS = ("unsorted", "sorted")

DISTURBED = 0.1
"""The share of the processors' time that other processes may use in a turn."""


@dataclass(frozen=True)
class Run:
    """One run of a workload: seconds, seconds within the target's forwards, their number, and the tokens."""

    seconds: float
    forward_s: float
    steps: int
    tokens: list[list[int]]


def log_uniform(draw: random.Random, low: int, high: int) -> int:
    """Draws a number from `low` to `high` whose logarithm is uniform."""
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def lengths_of(workload: str, count: int, seed: int) -> list[tuple[int, int]]:
    """Draws the number of prompt tokens and of output tokens of each request."""
    draw, (prompts, answers) = random.Random(f"{workload} {seed}"), WORKLOADS[workload]
    return [(log_uniform(draw, *prompts), log_uniform(draw, *answers)) for _ in range(count)]


def ordered(lengths: Sequence[tuple[int, int]], order: str) -> list[int]:
    """Returns the numbers of the requests in the order in which they are given."""
    numbers = list(range(len(lengths)))
    return numbers if order == "unsorted" else sorted(numbers, key=lambda number: -lengths[number][1])


class Worker:
    """Runs one checkout. It uses only what both checkouts have, except for `cost`."""

    def __init__(self, given: dict[str, Any]):
        from foredraft import LLM

        has_steps = Path("src/foredraft/cache/prefixes.py").exists()
        alone = {"enable_prefix_caching": False, "max_num_batched_tokens": MAX_ROWS} if has_steps else {}
        limits = {"max_num_seqs": NUM_SEQS, "max_model_len": MAX_LEN}
        self.llm = LLM(given["model"], {"method": "ar"}, dtype=given["dtype"], device="cpu", **limits, **alone)
        self.lengths = {name: [tuple(pair) for pair in pairs] for name, pairs in given["lengths"].items()}
        self._seed, self._pool, self._forward = given["seed"], None, self.llm.target.forward
        self._seconds, self._steps = 0.0, 0
        self.llm.target.forward = self._timed  # type: ignore[method-assign]

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        began = perf_counter()
        scores = self._forward(*args, **kwargs)
        self._seconds, self._steps = self._seconds + perf_counter() - began, self._steps + 1
        return scores

    def run(self, workload: str, order: Sequence[int], most: int = MAX_LEN) -> list[Any]:
        """Generates the answers of a workload, each of at most `most` tokens. Returns the fields of `Run`."""
        from foredraft import SamplingParams

        draw, vocab_size = random.Random(self._seed), self.llm.target.vocab_size
        prompts = [[draw.randrange(3, vocab_size) for _ in range(prompt)] for prompt, _ in self.lengths[workload]]
        given = [{"prompt_token_ids": prompts[number]} for number in order]
        limits = [min(most, self.lengths[workload][number][1]) for number in order]
        params = [SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True) for limit in limits]
        self._seconds, self._steps, began = 0.0, 0, perf_counter()
        outputs = self.llm.generate(given, params)
        seconds = perf_counter() - began
        found = dict(zip(order, ([*output.outputs[0].token_ids] for output in outputs), strict=True))
        return [seconds, self._seconds, self._steps, [found[number] for number in sorted(found)]]

    def cost(self, decoding: int, rows: int, before: int) -> float:
        """Times the forward of a step, best of some; see `ideal.measured_costs`. Later checkouts only."""
        import numpy as np

        from foredraft.cache.blocks import num_blocks
        from foredraft.core.tree import TreeBatch
        from foredraft.engine.one_thread import one_thread

        if self._pool is None:
            self._pool = self.llm.target.new_pool(num_blocks(MAX_LEN, NUM_SEQS + 1))
        contexts = [CONTEXT + before] * decoding + [before] * (rows > 0)
        batch = TreeBatch.chains([[5]] * decoding + [[5] * rows] * (rows > 0))
        caches, times = [self._pool.allocate() for _ in contexts], []
        try:
            for cache, context in zip(caches, contexts, strict=True):
                cache.reserve(context + rows + 1)
                cache.length = context
            with one_thread:
                for _ in range(2 if rows > 128 else 7):
                    began = perf_counter()
                    self._forward(batch, caches, np.arange(decoding))
                    times.append(perf_counter() - began)
        finally:
            for cache in caches:
                self._pool.free(cache)
        return sorted(times)[(len(times) - 1) // 2]


def work(given: dict[str, Any]) -> None:
    """Answers questions on the standard input, a line each: the name of a method of `Worker` and its arguments."""
    worker = Worker(given)
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


def row_of(rounds: Sequence[tuple[Run, Run, float]], tokens: int) -> dict[str, Any]:
    """Summarises the rounds of a workload in one order: the runs of both checkouts, and the seconds of the ideal scheduler."""
    from measuring import median

    pairs = [old.seconds / new.seconds for old, new, _ in rounds]
    bounds = [old.seconds / ideal for old, _, ideal in rounds]
    reached = [(pair - 1) / (bound - 1) for pair, bound in zip(pairs, bounds, strict=True)]
    names = ("before", "after", "ideal")
    columns = zip(*((old.seconds, new.seconds, ideal) for old, new, ideal in rounds), strict=True)
    row: dict[str, Any] = {"rounds": len(rounds)}
    row |= {f"{name}_tokens_per_s": tokens / median(seconds) for name, seconds in zip(names, columns, strict=True)}
    for name, values in (("ratio", pairs), ("ideal_ratio", bounds), ("reached", reached)):
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), interval(values), strict=True))
    for which, name in enumerate(names[:2]):
        runs = [pair[which] for pair in rounds]
        row[f"{name}_steps"] = runs[0].steps
        row[f"{name}_outside_share"] = median([1 - run.forward_s / run.seconds for run in runs])
    row["forwards_over_ideal"] = median([new.forward_s / ideal for _, new, ideal in rounds])
    row["equal_outputs"] = sum(map(list.__eq__, rounds[0][0].tokens, rounds[0][1].tokens))
    return row


def ticks(pids: Sequence[int]) -> tuple[int, int, int]:
    """Returns the ticks of all processors, those in which they worked, and those of some processes. Zeros without Linux."""
    try:
        every = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split() for pid in pids]
    except OSError:
        return 0, 0, 0
    return sum(every), sum(every) - every[3] - every[4], sum(int(field[11]) + int(field[12]) for field in fields)


def undisturbed(turn: Callable[[], Any], pids: Sequence[int], tries: int) -> Any:
    """Runs a turn until no other process works beside it, at most `tries` times. Returns the least disturbed result."""
    found = []
    for number in range(tries):
        before = ticks(pids)
        result = turn()
        total, busy, own = (new - old for old, new in zip(before, ticks(pids), strict=True))
        share = (busy - own) / max(1, total)
        found.append((share, number, result))
        if share < DISTURBED:
            break
    return min(found)[2]


def turn_of(checkouts: Sequence[Checkout], workload: str, lengths: Sequence[tuple[int, int]], numbers: Sequence[int]) -> Any:
    """Measures the costs, and runs a workload with both checkouts. Returns both runs and the ideal seconds."""
    sleep(PAUSE_S)
    costs = measured_costs(lambda *step: checkouts[1].ask("cost", *step))
    runs = {}
    for which in random.sample((0, 1), 2):
        sleep(PAUSE_S)
        runs[which] = Run(*checkouts[which].ask("run", workload, numbers))
    return runs[0], runs[1], ideal_seconds([lengths[number] for number in numbers], costs, NUM_SEQS, MAX_ROWS)


def measure(checkouts: Sequence[Checkout], workloads: dict[str, list[tuple[int, int]]], given: Any) -> dict[Any, list[Any]]:
    """Runs the rounds. Returns the runs and the ideal seconds by workload and order."""
    from measuring import rounds

    found, pids = defaultdict(list), [os.getpid(), *(checkout.pid for checkout in checkouts)]
    for checkout in checkouts:
        checkout.ask("run", next(iter(workloads)), list(range(NUM_SEQS)), 8)
    for _ in rounds(given.rounds, given.minutes):
        for workload, lengths in workloads.items():
            for order in ORDERS:
                turn = partial(turn_of, checkouts, workload, lengths, ordered(lengths, order))
                old, new, ideal = undisturbed(turn, pids, given.tries)
                found[workload, order].append((old, new, ideal))
                print(f"{workload}, {order}: {old.seconds:.2f}, {new.seconds:.2f}, {ideal:.2f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measures, writes and prints."""
    import torch
    from measuring import arguments, report, rounded

    from foredraft.core.folders import BUNDLED_TARGET
    from foredraft.kernels.sets import sets_here

    parser = arguments(__doc__, minutes=6)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, whose kernels are built")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="seed of lengths and prompts")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tries", type=int, default=2, help="how often a turn runs that other processes disturb")
    given = parser.parse_args()
    if given.device not in (None, "cpu"):
        parser.error("--device: only a CPU is compared")
    model = str(Path(given.model or BUNDLED_TARGET).resolve())
    workloads = {name: lengths_of(name, given.requests, given.seed) for name in given.workloads}
    setting = {"model": model, "dtype": given.dtype, "lengths": workloads, "seed": given.seed}
    checkouts = [Checkout(folder, setting, Path(__file__)) for folder in (given.before.resolve(), HERE)]
    found, rows = measure(checkouts, workloads, given), []
    for (workload, order), measured in found.items():
        prompts, answers = map(sum, zip(*workloads[workload], strict=True))
        row = {"model": Path(model).name, "workload": workload, "order": order, "requests": given.requests}
        row |= {"prompt_tokens": prompts, "answer_tokens": answers, **row_of(measured, answers)}
        pairs = [best[1].seconds / mine[1].seconds for mine, best in zip(measured, found[workload, "sorted"], strict=True)]
        row |= dict(zip(("of_sorted", "of_sorted_low", "of_sorted_high"), interval(pairs), strict=True))
        rows.append(rounded({**row, "sets": sets_here()}))
    columns = ["model", "workload", "order", "before_tokens_per_s", "after_tokens_per_s", "ideal_tokens_per_s"]
    columns += ["ratio", "ratio_low", "ratio_high", "ideal_ratio", "reached", "of_sorted", "equal_outputs"]
    columns += ["before_steps", "after_steps", "before_outside_share", "after_outside_share", "forwards_over_ideal", "rounds"]
    report(given.output, rows, columns, device=torch.device("cpu"), dtype=given.dtype)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(json.loads(sys.argv[-1]))
    else:
        main()
