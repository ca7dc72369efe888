"""Measures chats that share a system prompt: how often it is computed, the time to the first token, and the blocks in use.

Each method runs the chats with and without shared prefixes; the tokens must be equal. Prompts are random token ids, decoding is
greedy. `times_computed` is the number of prefix tokens that were computed, over all chats, relative to the prefix.
`first_token_ratio` is the time from the request to the first token of a second chat, relative to that of a first chat that has
ended, with the prefix of a round of its own. `blocks_ratio` is the number of tokens that the blocks in use could hold, relative
to the distinct tokens in them, at the peak of the blocks.

    python benchmarks/shared_prefix.py --output benchmarks/results/shared-prefix-14m.jsonl
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from measuring import arguments, median, report, rounded
from revisions import interval

from foredraft import LLM, SamplingParams
from foredraft.cache.blocks import BLOCK
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.params import RequestOutputKind
from foredraft.kernels.sets import sets_here

METHODS = {"ar": {"method": "ar"}, "fspad": {"method": "fspad", "tree": "chain", "num_speculative_tokens": 4}}
COLUMNS = (
    *("model", "method", "computed_whole", "times_computed", "first_token_ms", "first_token_ratio", "blocks_ratio"),
    *("equal_outputs", "tokens_per_s", "alone_tokens_per_s", "alone_blocks"),
)


@dataclass(frozen=True)
class Outcome:
    """A run of all chats.

    Attributes:
        tokens: the answers.
        cached: number of prompt tokens that each chat found.
        blocks: largest number of blocks in use.
        distinct: number of distinct tokens in them then.
    """

    seconds: float
    tokens: list[list[int]]
    cached: list[int]
    blocks: int
    distinct: int


def run(llm: LLM, prompts: Sequence[list[int]], prefix: int, max_tokens: int) -> Outcome:
    """Answers all chats, which arrive at once."""
    engine, sampling = llm.engine, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    sampling = sampling.giving(RequestOutputKind.FINAL_ONLY)
    blocks, peak, outputs, began = engine.scheduler.pool.blocks, (0, 0), {}, perf_counter()
    requests = [engine.add_request(None, {"prompt_token_ids": prompt}, sampling) for prompt in prompts]
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        held = blocks.count - blocks.num_free
        if held > peak[0]:
            lengths = [sequence.cache.length for sequence in engine.scheduler.running]
            peak = held, max(min(length, prefix) for length in lengths) + sum(max(0, length - prefix) for length in lengths)
    seconds, done = perf_counter() - began, [outputs[request.request_id] for request in requests]
    tokens = [[*output.outputs[0].token_ids] for output in done]
    return Outcome(seconds, tokens, [output.num_cached_tokens for output in done], *peak)


def first_token_s(llm: LLM, prompt: list[int]) -> float:
    """Returns the seconds from a request to its first token. The request ends after eight tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    began = perf_counter()
    times = [perf_counter() for _ in llm.stream({"prompt_token_ids": prompt}, sampling)]
    return times[0] - began


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=1000, help="number of tokens of the system prompt")
    parser.add_argument("--question", type=int, default=30, help="number of tokens of a question")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7, help="number of times to the first token")
    given = parser.parse_args()
    draw, limits = random.Random(0), {"max_num_seqs": given.chats, "dtype": given.dtype, "device": given.device}
    limits["max_model_len"] = given.prefix + given.question + given.max_tokens
    limits["kv_cache_memory_bytes"] = 8 << 30
    shared, rows = LLM(given.model, METHODS[given.methods[0]], **limits), []
    alone = LLM(given.model, METHODS[given.methods[0]], enable_prefix_caching=False, **limits)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, shared.target.vocab_size) for _ in range(count)]

    def prompts(count: int) -> list[list[int]]:
        prefix = ids(given.prefix)
        return [prefix + ids(given.question) for _ in range(count)]

    chats = prompts(given.chats)
    for method in given.methods:
        one, other = shared.with_speculation(METHODS[method]), alone.with_speculation(METHODS[method])
        first_token_s(one, prompts(1)[0])
        pairs = [[first_token_s(one, prompt) for prompt in prompts(2)] for _ in range(given.rounds)]
        mine, theirs = run(one, chats, given.prefix, given.max_tokens), run(other, chats, given.prefix, given.max_tokens)
        row: dict[str, Any] = {"model": (given.model or BUNDLED_TARGET.name).rsplit("/", 1)[-1], "method": method}
        row |= {"chats": given.chats, "prefix": given.prefix, "computed_whole": mine.cached.count(0)}
        row["times_computed"] = sum(given.prefix - min(count, given.prefix) for count in mine.cached) / given.prefix
        row |= {"first_token_ms": 1e3 * median([first for first, _ in pairs])}
        row |= {"second_token_ms": 1e3 * median([second for _, second in pairs])}
        ratios = interval([second / first for first, second in pairs])
        row |= dict(zip(("first_token_ratio", "first_token_ratio_low", "first_token_ratio_high"), ratios, strict=True))
        row |= {"peak_blocks": mine.blocks, "distinct_tokens": mine.distinct}
        row |= {"blocks_ratio": mine.blocks * BLOCK / mine.distinct, "alone_blocks": theirs.blocks}
        row |= {"equal_outputs": sum(map(list.__eq__, mine.tokens, theirs.tokens))}
        count = sum(map(len, mine.tokens))
        row |= {"tokens_per_s": count / mine.seconds, "alone_tokens_per_s": count / theirs.seconds}
        rows.append(rounded({**row, "sets": sets_here()}))
    report(given.output, rows, COLUMNS, device=torch.device(shared.target.device), dtype=given.dtype)


if __name__ == "__main__":
    main()
