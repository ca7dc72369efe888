"""Measures the time of a step outside the forward passes of the two models, by size of the tree, its policy and the sampling.

    python benchmarks/overhead.py --output benchmarks/results/overhead-14m.jsonl
    python benchmarks/overhead.py --model build/chat-350m --output benchmarks/results/overhead-350m.jsonl

The `forward` of both models is timed from outside. The rest of a step is split by the times in its record: growth of the tree
(`propose` without the draft model), distributions and rule, cache, and the remainder (text, stop strings, drafter updates).

Settings take turns on every prompt. The first step of each turn, which runs the prompt, is not counted. Neither is the first
round. Times are medians over steps, so the parts need not add up to the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from time import perf_counter
from typing import Any

import torch
from measuring import LAWS, arguments, drafting, median, read_prompts, report, rotated, rounded, rounds, synchronize

from foredraft import LLM, SamplingParams
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.metrics import StepRecord
from foredraft.core.progress import progress_bar

LONGEST_CHAIN = 16

COLUMNS = (
    *("tree", "nodes", "sampling", "drafted", "passes"),
    *("step_ms", "target_ms", "draft_ms", "grow_ms", "rule_ms", "keep_ms", "rest_ms", "outside_ms", "outside_share"),
)


@dataclass
class Stopwatch:
    """Measures the seconds and calls of one model's `forward` since the last `take`."""

    device: torch.device
    seconds: float = 0.0
    calls: int = 0

    def timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `forward` with its time measured."""

        def run(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            began = perf_counter()
            scores = forward(*args, **kwargs)
            synchronize(self.device)
            self.seconds += perf_counter() - began
            self.calls += 1
            return scores

        return run

    def take(self) -> tuple[float, int]:
        """Returns seconds and calls, and resets both."""
        seconds, calls = self.seconds, self.calls
        self.seconds, self.calls = 0.0, 0
        return seconds, calls


@contextmanager
def on_the_clock(*models: Any) -> Iterator[list[Stopwatch]]:
    """Times the forward passes of every model in a block."""
    watches = [Stopwatch(model.device) for model in models]
    for model, watch in zip(models, watches, strict=True):
        model.forward = watch.timed(model.forward)
    try:
        yield watches
    finally:
        for model in models:
            del model.forward  # restores the method of the class


@dataclass(eq=False)
class Setting:
    """One combination of tree, size and sampling, and its steps, with times in seconds."""

    tree: str
    nodes: int
    law: str
    llm: LLM
    steps: list[dict[str, float]] = field(default_factory=list)

    @property
    def sampling(self) -> SamplingParams:
        """Sampling parameters of its requests."""
        return replace(LAWS[self.law], ignore_eos=True, seed=0)

    def run(self, prompt: list[int], num_steps: int) -> Iterator[dict[str, float]]:
        """Yields the measurements of `num_steps` steps after the first step."""
        engine = self.llm.engine
        request = engine.add_request(None, prompt, self.sampling)
        drafter: Any = self.llm.engine.drafter
        with on_the_clock(self.llm.target, drafter.model) as (target, draft):
            while not request.sequences[0].records:
                engine.step()
            for _ in range(num_steps):
                target.take()
                draft.take()
                began = perf_counter()
                if request.is_finished:
                    break
                engine.step()
                synchronize(self.llm.target.device)
                seconds = perf_counter() - began
                yield split(seconds, target.take()[0], draft.take(), request.sequences[0].records[-1])
        engine.abort_request(request.request_id)

    def row(self) -> dict[str, Any]:
        """Makes a row of medians over the steps, with times in milliseconds."""
        found = {name: median([step[name] for step in self.steps]) for name in self.steps[0]}
        times = {name: 1000 * value for name, value in found.items() if name.endswith("_ms")}
        share = sum(step["outside_ms"] for step in self.steps) / sum(step["step_ms"] for step in self.steps)
        setting = {"tree": self.tree, "nodes": self.nodes, "sampling": self.law, "num_steps": len(self.steps)}
        return rounded({**setting, **found, **times, "outside_share": share})


def split(seconds: float, target_s: float, draft: tuple[float, int], record: StepRecord) -> dict[str, float]:
    """Splits the time of one step into its parts."""
    draft_s, passes = draft
    known = record.draft_s + record.verify_s + record.rule_s + record.cache_s
    return {
        "drafted": record.num_draft_tokens,
        "accepted": record.num_accepted_tokens,
        "passes": passes,
        "step_ms": seconds,
        "target_ms": target_s,
        "draft_ms": draft_s,
        "grow_ms": record.draft_s - draft_s,
        "rule_ms": record.rule_s,
        "keep_ms": record.cache_s,
        "rest_ms": seconds - known + record.verify_s - target_s,
        "outside_ms": seconds - target_s - draft_s,
    }


def settings(plain: LLM, draft_model: str, sizes: list[int], trees: list[str]) -> list[Setting]:
    """Makes all combinations. Chains have at most `LONGEST_CHAIN` nodes."""
    found = []
    for tree, nodes in product(trees, sizes):
        if tree != "chain" or nodes <= LONGEST_CHAIN:
            llm = plain.with_speculation(drafting(draft_model, tree, nodes))
            found += [Setting(tree, nodes, law, llm) for law in LAWS]
    return found


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, minutes=3.0)
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 64, 256, 768], help="numbers of nodes of the trees")
    parser.add_argument("--trees", nargs="+", default=["dyspec", "topk", "chain"], help="names of the trees")
    parser.add_argument("--prompts", type=int, default=6, help="number of rounds after the warm-up")
    parser.add_argument("--steps", type=int, default=4, help="number of steps of a turn")
    args = parser.parse_args()
    plain = LLM(args.model or BUNDLED_TARGET, {"method": "ar"}, dtype=args.dtype, device=args.device, max_num_seqs=1)
    prompts = read_prompts(plain, args.prompts + 1)
    every = settings(plain, args.draft_model, args.nodes, args.trees)
    with progress_bar("measuring", len(prompts) * len(every)) as advance:
        for number in rounds(len(prompts), args.minutes):
            for setting in rotated(every, number):
                steps = list(setting.run(prompts[number], args.steps if number else 1))
                setting.steps += steps if number else []
                advance(1)
    rows = [setting.row() for setting in every if setting.steps]
    report(args.output, rows, COLUMNS, device=plain.target.device, dtype=args.dtype)


if __name__ == "__main__":
    main()
