"""Measures drafting by load: tokens per second with a drafter over plain decoding, by the number of running requests.

    python benchmarks/prompts.py --data DATA --each 60 --first 16 --output build/held-out.jsonl
    python benchmarks/running.py --prompts build/held-out.jsonl --output benchmarks/results/running-14m.jsonl

Only prompts whose plain greedy answer does not loop take part (`foredraft.bench.tasks.is_looping`), because a loop is easy to
draft. Plain decoding and the drafter take turns on the same group of prompts, which runs at once. Prefixes are not shared. A
turn ends when each request has decoded `--max-tokens` tokens on average. Steps up to the first token of every request are not
counted, because they compute prompts. All others are, also those that try whether drafting pays again. `ratio_with_prompts`
counts all steps.

`ratio_allowed` is the largest ratio that the drafter could reach with any size of tree. It is computed from the stored costs of
steps. The tokens per step of the calibration are scaled by the acceptance that was measured at this load. `budgets` maps a
number of nodes to the share of the requests' steps that allowed it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

from measuring import LAWS, arguments, report, rounded, rounds, synchronize
from revisions import interval

from foredraft import LLM, SamplingParams
from foredraft.bench import tasks
from foredraft.core.costs import Costs
from foredraft.core.folders import BUNDLED, BUNDLED_TARGET
from foredraft.core.metrics import StepRecord
from foredraft.core.params import RequestOutputKind
from foredraft.kernels import instruction_set

COLUMNS = (
    *("running", "temperature", "plain_tokens_per_s", "tokens_per_s", "ratio", "ratio_low", "ratio_high"),
    *("ratio_with_prompts", "ratio_allowed"),
    *("acceptance_length", "mean_nodes", "pairs"),
)


@dataclass
class Turn:
    """Tokens and seconds of the steps in which all requests of a group decode, and the records of these steps.

    Attributes:
        before_tokens, before_s: the same of the steps before, which also compute prompts.
    """

    tokens: int = 0
    seconds: float = 0.0
    records: list[StepRecord] = field(default_factory=list)
    before_tokens: int = 0
    before_s: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def run(llm: LLM, prompts: Sequence[list[int]], sampling: SamplingParams) -> Turn:
    """Runs a group of prompts until the steps in which all decode have `max_tokens` tokens a request."""
    engine, turn = llm.engine, Turn()
    params = replace(sampling, max_tokens=None).giving(RequestOutputKind.FINAL_ONLY)
    requests = [engine.add_request(None, {"prompt_token_ids": prompt}, params) for prompt in prompts]
    outputs = [request.sequences[0] for request in requests]
    while turn.tokens < (sampling.max_tokens or 0) * len(prompts):
        counts, began = [len(output.token_ids) for output in outputs], perf_counter()
        engine.step()
        synchronize(llm.target.device)
        seconds = perf_counter() - began
        added = [len(output.token_ids) - count for output, count in zip(outputs, counts, strict=True)]
        if all(added) and all(count > output.num_prompt for output, count in zip(outputs, counts, strict=True)):
            turn.tokens, turn.seconds = turn.tokens + sum(added), turn.seconds + seconds
            turn.records += [output.records[-1] for output in outputs]
        else:
            turn.before_tokens, turn.before_s = turn.before_tokens + sum(added), turn.before_s + seconds
    engine.abort_request([request.request_id for request in requests])
    while engine.has_unfinished_requests():
        engine.step()
    return turn


def quiet_prompts(llm: LLM, path: Path, num_tokens: int) -> list[list[int]]:
    """Reads the prompts whose plain greedy answer of `num_tokens` tokens does not loop."""
    prompts = tasks.encode(llm, tasks.read_prompts(path), raw=False)
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    pairs = zip(prompts, answers, strict=True)
    return [prompt for prompt, answer in pairs if not tasks.is_looping(answer.outputs[0].token_ids)]


def allowed(costs: Costs | None, records: Sequence[StepRecord], running: int) -> float:
    """Computes the best ratio that stored costs and measured acceptance allow, see the docstring of this module."""
    if costs is None:
        return 1.0
    drafted = [record for record in records if record.num_draft_tokens]
    expected = sum(costs.gain(record.num_draft_tokens) for record in drafted)
    share = sum(record.num_accepted_tokens for record in drafted) / expected if expected else 1.0
    plain = costs.step_s(running, 0)
    sizes = [int(size) for size, *_ in costs.tokens]
    return max([1.0, *((1 + share * costs.gain(nodes)) * plain / costs.step_s(running, nodes) for nodes in sizes)])


def row_of(running: int, law: str, pairs: Sequence[tuple[Turn, Turn]], costs: Costs | None) -> dict[str, Any]:
    """Makes a row of the pairs of turns, plain decoding first."""
    ratios = [drafted.speed / plain.speed for plain, drafted in pairs]
    middle, low, high = interval(ratios)
    records = [record for _, drafted in pairs for record in drafted.records]
    budgets = Counter(record.budget for record in records)
    plain_speed, speed = (
        sum(pair[side].tokens for pair in pairs) / sum(pair[side].seconds for pair in pairs) for side in (0, 1)
    )
    plain_all, all_speed = (
        sum(pair[side].tokens + pair[side].before_tokens for pair in pairs)
        / sum(pair[side].seconds + pair[side].before_s for pair in pairs)
        for side in (0, 1)
    )
    return rounded(
        {
            "running": running,
            "temperature": law,
            "plain_tokens_per_s": plain_speed,
            "tokens_per_s": speed,
            "ratio": speed / plain_speed,
            "ratio_median": middle,
            "ratio_low": low,
            "ratio_high": high,
            "ratio_with_prompts": all_speed / plain_all,
            "ratio_allowed": allowed(costs, records, running),
            "acceptance_length": sum(record.num_tokens for record in records) / len(records),
            "mean_nodes": sum(record.budget for record in records) / len(records),
            "budgets": {nodes: count / len(records) for nodes, count in sorted(budgets.items())},
            "ratios": ratios,
            "pairs": len(pairs),
        }
    )


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, models=False, minutes=15.0)
    parser.add_argument("--model", default=str(BUNDLED_TARGET), help="directory of the target")
    parser.add_argument("--head", default=str(BUNDLED / "fspad"), help="directory of the draft head")
    parser.add_argument("--method", default="auto", help="method of the drafter")
    parser.add_argument("--prompts", type=Path, required=True, help="held-out prompts, a .jsonl file")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of running requests")
    parser.add_argument("--laws", nargs="+", choices=list(LAWS), default=["0", "1"], help="sampling parameters, by name")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of a request in a turn")
    args = parser.parse_args()
    options = {"dtype": args.dtype, "device": args.device, "enable_prefix_caching": False, "max_num_seqs": max(args.running)}
    plain = LLM(args.model, {"method": "ar"}, **options)
    drafted = plain.with_speculation({"method": args.method, "model": args.head})
    prompts = quiet_prompts(plain, args.prompts, args.max_tokens)
    supply = cycle(prompts)
    found: dict[tuple[int, str], list[tuple[Turn, Turn]]] = {}
    for number in rounds(1 + args.rounds, args.minutes):  # the first round is a warm-up
        for running, law in ((running, law) for running in args.running for law in args.laws):
            sampling = replace(LAWS[law], max_tokens=args.max_tokens, ignore_eos=True)
            for group in range(max(1, 8 // running) if number else 1):
                some = list(islice(supply, running))
                order = [plain, drafted][:: 1 if (number + group) % 2 else -1]
                turns = {id(llm): run(llm, some, sampling) for llm in order}
                if number:
                    found.setdefault((running, law), []).append((turns[id(plain)], turns[id(drafted)]))
    kinds = {law: "greedy" if LAWS[law].temperature == 0 else "sampled" for law in args.laws}
    shared = {"model": Path(args.model).name, "kernels": instruction_set(), "num_prompts": len(prompts)}
    shared |= {"drafting": {law: drafted.drafting(LAWS[law])["reason"] for law in args.laws}}
    rows = [
        {**shared, **row_of(running, law, pairs, drafted.plan.costs(kinds[law]) if drafted.plan else None)}
        for (running, law), pairs in found.items()
    ]
    report(args.output, rows, COLUMNS, device=plain.target.device, dtype=args.dtype)


if __name__ == "__main__":
    main()
