"""Compares plain and speculative decoding of the bundled model, greedy.

    python examples/demo.py

It runs first in bfloat16 with the drafter that is fastest on this machine, then in float64 with token trees of the bundled
head. The exit status is 1 if any float64 output differs from plain decoding.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from foredraft import LLM, CompletionOutput, SamplingParams
from foredraft.audit.greedy import divergence, num_identical

PROMPTS = [
    "Name three things that a beginner should bring on a mountain walk, and say why.",
    "Write a Python function that returns the largest number of a list.",
    "Explain to a child how rain is made.",
    "A farmer has 12 baskets with 8 apples each and sells 30 apples. How many are left?",
    "What is the difference between a lake and a sea?",
    "Write a short letter to a friend who moved to another city.",
]
PLAIN = {"method": "ar"}
FASTEST = {"method": "auto"}
TREES = {"method": "fspad", "tree": "dyspec", "num_speculative_tokens": 8}
SAMPLING = SamplingParams(temperature=0, max_tokens=96)
ROUNDS = 5
"""Rounds in bfloat16, whose times are short."""

OUT = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Pair:
    """One prompt with its plain and its speculative output. Seconds include the pass over the prompt."""

    prompt_ids: list[int]
    plain: CompletionOutput
    drafted: CompletionOutput
    plain_s: float
    drafted_s: float

    @property
    def num_identical(self) -> int:
        """Number of tokens before the first difference."""
        return num_identical(self.plain.token_ids, self.drafted.token_ids)

    @property
    def identical(self) -> bool:
        """Whether the outputs are equal."""
        return self.plain.token_ids == self.drafted.token_ids

    @property
    def plain_ms(self) -> float:
        """Milliseconds per token of plain decoding."""
        return 1000 * self.plain_s / len(self.plain.token_ids)

    @property
    def drafted_ms(self) -> float:
        """Milliseconds per token of speculative decoding."""
        return 1000 * self.drafted_s / len(self.drafted.token_ids)


def run(dtype: str, config: dict[str, Any], rounds: int = 1) -> tuple[LLM, list[Pair]]:
    """Decodes every prompt plainly and speculatively, in turn, after a warm-up. No round finds the prompt of another one."""
    plain, drafted = (LLM(speculative_config=way, dtype=dtype, enable_prefix_caching=False) for way in (PLAIN, config))
    way = drafted.drafting(SAMPLING)
    given = f"drafting: {way['method']}, {way['tree']} {way['budget']} nodes"
    OUT.print(f"{dtype}, greedy, at most {SAMPLING.max_tokens} tokens; {way['reason'] or given}")
    for llm in (plain, drafted):
        llm.chat([{"role": "user", "content": "warm-up"}], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    return plain, [_both(plain, drafted, prompt, rounds) for prompt in PROMPTS]


def _both(plain: LLM, drafted: LLM, prompt: str, rounds: int) -> Pair:
    """Decodes a prompt in turns, and takes the median times."""
    results, seconds = {}, {plain: [], drafted: []}
    for number in range(rounds):
        for llm in [plain, drafted][:: 1 if number % 2 else -1]:
            began = perf_counter()
            [results[llm]] = llm.chat([{"role": "user", "content": prompt}], SAMPLING)
            seconds[llm].append(perf_counter() - began)
    first, second = results[plain], results[drafted]
    return Pair(first.prompt_token_ids, first.outputs[0], second.outputs[0], median(seconds[plain]), median(seconds[drafted]))


def show(pairs: list[Pair]) -> None:
    """Prints the table of a run and its paired speed-up."""
    table = Table(box=SIMPLE)
    table.add_column("plain output", no_wrap=True)
    for title in ("identical", "plain ms", "drafted ms", "speed-up", "tokens/step"):
        table.add_column(title, justify="right", no_wrap=True)
    for pair in pairs:
        table.add_row(
            " ".join(pair.plain.text.split())[:12],
            f"{pair.num_identical} of {len(pair.plain.token_ids)}",
            f"{pair.plain_ms:.2f}",
            f"{pair.drafted_ms:.2f}",
            f"{pair.plain_ms / pair.drafted_ms:.2f}",
            f"{pair.drafted.metrics.acceptance_length:.2f}",
        )
    OUT.print(table)
    ratio = median(pair.plain_ms / pair.drafted_ms for pair in pairs)
    OUT.print(f"Milliseconds per token include the prompt pass; tokens/step is acceptance_length. Median speed-up {ratio:.2f}.")


def explain(plain: LLM, pairs: list[Pair]) -> None:
    """Prints every divergence of a run, with its margin."""
    for number, pair in enumerate(pairs, start=1):
        found = divergence(plain, pair.prompt_ids, pair.plain.token_ids, pair.drafted.token_ids)
        if found is None:
            continue
        pair_of_tokens = found.plain_token, found.drafted_token
        plain_token, drafted_token = (repr(plain.tokenizer.decode([token])) for token in pair_of_tokens)
        verdict = "a float tie" if found.is_tie else "NOT a float tie"
        OUT.print(
            f"Prompt {number} diverges at token {found.position}: {plain_token} (plain) or {drafted_token}; "
            f"margin of the logits {found.margin:.4f}, rounding of this forward pass {found.rounding:.4f}: {verdict}."
        )


def main() -> int:
    """Runs the demo, and returns the exit status: 0 if all float64 outputs are identical, else 1."""
    plain, pairs = run("bfloat16", FASTEST, ROUNDS)
    show(pairs)
    explain(plain, pairs)
    plain, exact = run("float64", TREES)
    show(exact)
    same = sum(pair.identical for pair in exact)
    tokens = sum(pair.num_identical for pair in exact)
    OUT.print(f"float64: {same} of {len(exact)} outputs are identical ({tokens} tokens).")
    return 0 if same == len(exact) else 1


if __name__ == "__main__":
    sys.exit(main())
