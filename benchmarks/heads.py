"""Compares draft heads on prompts of the six task families of Spec-Bench.

    python benchmarks/heads.py --data ../shared/data/eval --output benchmarks/results/heads-14m-greedy.jsonl \
        eagle=build/heads/eagle:topk:16 fspad=build/heads/fspad:topk:16 ctc=build/heads/ctc::16

Methods are given as in `foredraft bench`. All methods and plain decoding take turns on every prompt. Prompts over 448 tokens
are cut in the middle. A row has the columns of `foredraft bench`, and these:

- tokens per step of every family, and of the prompts whose plain output does not loop;
- speed-up of the steps alone, without the pass over the prompt;
- in the row of plain decoding, `speedup_most`: the speed-up if steps took no time and only the pass over the prompt remained;
- forward passes and milliseconds of drafting per step;
- parameters and training minutes of the head.

The method `transformers` is plain decoding by that library. If it is given, it takes turns too, and every row has its speed-up
relative to it (`speedup_over`: over all prompts and over prompts that do not loop, each with its interval).

With `--no-times` a row has no times and no forward passes. It serves to measure heads while the machine is busy.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from measuring import report, rounded

from foredraft import LLM, SamplingParams
from foredraft.bench import tasks
from foredraft.bench.names import parse_method
from foredraft.bench.report import rows_of, speedup
from foredraft.bench.run import Outcome, measure
from foredraft.cli.bench import BenchOptions, contender
from foredraft.core.metrics import SPLIT, summarize
from foredraft.core.progress import progress_bar
from foredraft.heads.folder import read_head
from foredraft.plan.speculation import PLAIN

FAMILIES = ("chat", "translation", "summarization", "qa", "math_reasoning", "rag")
"""Families of Spec-Bench. The eight categories of MT-bench count as `chat`."""

LONGEST = 448
PEER = "transformers"
COLUMNS = (
    *("name", "parameters", "minutes", "acceptance_length", "not_looping", "speedup", "speedup_low", "speedup_high"),
    *("speedup_not_looping", "draft_forwards", "draft_ms", "verify_ms"),
)


class Task(NamedTuple):
    """A prompt of a family, as token ids, and whether it was cut."""

    family: str
    ids: list[int]
    was_cut: bool


def read_tasks(llm: LLM, data: Path, count: int) -> list[Task]:
    """Reads `count` prompts, equally many of each family, at equal distances in it. The families take turns in the result."""
    by_family: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for line in (data / "spec_bench.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_family[row["category"] if row["category"] in by_family else "chat"].append(row["turns"][0])
    shares = {family: count // len(FAMILIES) + (i < count % len(FAMILIES)) for i, family in enumerate(FAMILIES)}
    picked = {
        family: [prompts[i * len(prompts) // shares[family]] for i in range(shares[family])]
        for family, prompts in by_family.items()
    }
    order = [(family, picked[family][i]) for i in range(max(shares.values())) for family in FAMILIES if i < shares[family]]
    encoded = tasks.encode(llm, [prompt for _, prompt in order], raw=False)
    return [Task(family, cut(ids), len(ids) > LONGEST) for (family, _), ids in zip(order, encoded, strict=True)]


def cut(ids: list[int]) -> list[int]:
    """Cuts a prompt to its first and last tokens, at most `LONGEST` in total."""
    if len(ids) <= LONGEST:
        return ids
    return [*ids[: LONGEST // 2], *ids[-(LONGEST - LONGEST // 2) :]]


@contextmanager
def counted(drafter: Any) -> Iterator[list[int]]:
    """Counts the forward passes of a drafter in a block, in a list of one number.

    A forward pass is a call of the head on rows of new nodes or slots.
    """
    calls = [0]
    whole = getattr(drafter, "slots", drafter)  # `fill` runs a parallel head once, and `expand` only reads its results
    names = [name for name in ("fill", "expand") if hasattr(whole, name)][:1]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return function(*args, **kwargs)

        return run

    for name in names:
        setattr(whole, name, counting(getattr(whole, name)))
    yield calls
    for name in names:
        delattr(whole, name)


def forwards_a_step(llm: LLM, prompts: Sequence[list[int]], sampling: SamplingParams) -> float:
    """Measures the mean number of the drafter's forward passes per step."""
    with counted(llm.engine.drafter) as calls:
        outputs = llm.generate(list(prompts), sampling)
    return calls[0] / max(sum(output.metrics.num_steps for output in outputs), 1)


def lengths(outcomes: Sequence[Outcome]) -> float | None:
    """Computes the tokens per step; None without records."""
    records = [record for outcome in outcomes for request in outcome.records for record in request]
    return summarize(records).acceptance_length if records else None


def made(config: dict[str, Any]) -> dict[str, Any]:
    """Reads facts about a head: its parameters and, if recorded, the minutes and token passes of its training."""
    folder = Path(str(config.get("model")))
    if not folder.is_dir():
        return {}
    found = {"parameters": sum(parameter.numel() for parameter in read_head(folder).head.parameters())}
    file = folder / "provenance.json"
    about = json.loads(file.read_text()) if file.is_file() else {}
    return found | {key: about[key] for key in ("minutes", "token_passes") if key in about}


def step_seconds(outcomes: Sequence[Outcome]) -> float:
    """Computes the seconds of the steps alone, without the pass over the prompt, which all methods share."""
    return sum(getattr(outcome.metrics, part) for outcome in outcomes for part in SPLIT)


def of_steps(plain: Sequence[Outcome], outcomes: Sequence[Outcome]) -> float:
    """Computes the speed-up of the steps alone, from seconds per token."""
    before, after = (step_seconds(group) / sum(outcome.num_tokens for outcome in group) for group in (plain, outcomes))
    return before / after


def at_most(plain: Sequence[Outcome]) -> float:
    """Computes the speed-up if steps took no time and only the pass over the prompt remained."""
    whole = sum(outcome.seconds for outcome in plain)
    return whole / (whole - step_seconds(plain))


def over_peer(peer: Sequence[Outcome], outcomes: Sequence[Outcome], quiet: Sequence[int]) -> dict[str, Any]:
    """Computes the speed-up relative to a peer, with its interval, on all prompts and on the prompts `quiet`."""
    chosen = {"all": range(len(peer)), "not_looping": quiet}
    return {
        name: speedup([peer[i] for i in places], [outcomes[i] for i in places]) for name, places in chosen.items() if places
    }


def is_time(key: str) -> bool:
    """Returns whether a column of a row depends on measured times."""
    return key.endswith(("_s", "_ms")) or key.startswith(("speedup", "ms_"))


def compared(row: dict[str, Any], rounds: Sequence[dict[str, Outcome]], quiet: Sequence[int]) -> dict[str, Any]:
    """Computes the columns that a row of `foredraft bench` lacks.

    Args:
        quiet: numbers of the prompts whose plain output does not loop.
    """
    name, found = row["name"], dict[str, Any]()
    outcomes, plain = ([batch[key] for batch in rounds] for key in (name, PLAIN))
    quiet_outcomes, quiet_plain = ([group[i] for i in quiet] for group in (outcomes, plain))
    if PEER in rounds[0]:
        found["speedup_over"] = {PEER: over_peer([batch[PEER] for batch in rounds], outcomes, quiet)}
    if name != PEER:  # the steps of a peer are unknown
        found["speedup_steps"] = of_steps(plain, outcomes)
        found |= {"speedup_steps_not_looping": of_steps(quiet_plain, quiet_outcomes)} if quiet else {}
    if name == PLAIN and quiet:
        found |= {"speedup_most": at_most(plain), "speedup_most_not_looping": at_most(quiet_plain)}
    return found | {"not_looping": lengths(quiet_outcomes)}


def arguments() -> argparse.Namespace:
    """Parses the arguments of the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("methods", nargs="+", help=f"drafter=DIRECTORY:tree:budget, or {PEER}")
    parser.add_argument("--data", type=Path, required=True, help="folder of evaluation prompts")
    parser.add_argument("--model", help="directory of the target; default: the bundled one")
    parser.add_argument("--count", type=int, default=100, help="total number of prompts")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-times", action="store_true", help="measure only tokens per step, so that the machine may be busy")
    parser.add_argument("--output", type=Path, required=True, help="file for the results")
    args = parser.parse_args()
    if not (args.data / "spec_bench.jsonl").is_file():
        parser.error(f"no spec_bench.jsonl in {str(args.data)!r}: give the folder of evaluation prompts as --data")
    if args.no_times and PEER in args.methods:
        parser.error(f"{PEER} serves only to compare times: leave it out, or leave out --no-times")
    return args


def main() -> None:
    """Runs the command line."""
    args = arguments()
    plain = LLM(args.model, {"method": PLAIN}, dtype=args.dtype, max_num_seqs=1)
    sampling = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=0)
    every = read_tasks(plain, args.data, args.count)
    warm_up = tasks.encode(plain, tasks.WARM_UP, raw=False)
    configs = {name: parse_method(name, None) for name in args.methods if name != PEER}
    choice = BenchOptions("", args.data, model=args.model)
    names, rounds = dict.fromkeys([PLAIN, *args.methods]), []
    with ExitStack() as stack, progress_bar("measuring", len(every)) as advance:
        contenders = [contender(name, plain, choice, warm_up, sampling, stack) for name in names]
        for outcome in measure(contenders, [task.ids for task in every], sampling, batch_size=1, warm_up=warm_up):
            rounds.append(outcome)
            advance(1)
    quiet = [i for i, batch in enumerate(rounds) if not tasks.is_looping(batch[PLAIN].token_ids[0])]
    rows = rows_of(contenders, rounds, args.temperature)
    for row in rows:
        row |= compared(row, rounds, quiet)
        row |= {"weights_mb": plain.target.num_weight_bytes / 1e6, **made(configs.get(row["name"], {}))}
        outcomes = [batch[row["name"]] for batch in rounds]
        row["families"] = {
            family: lengths([outcome for outcome, task in zip(outcomes, every, strict=True) if task.family == family])
            for family in FAMILIES
        }
        row["cut"] = dict(Counter(task.family for task in every if task.was_cut))
        if row["name"] in configs and not args.no_times:
            drafting = plain.with_speculation(configs[row["name"]])
            row["draft_forwards"] = forwards_a_step(drafting, warm_up, sampling)
            row |= {f"{part}_ms": 1000 * row[f"{part}_s"] / row["num_steps"] for part in ("draft", "verify")}
    kept = [{key: row[key] for key in row if not (args.no_times and is_time(key))} for row in rows]
    report(args.output, [rounded(row) for row in kept], COLUMNS, device=plain.target.device, dtype=args.dtype)


if __name__ == "__main__":
    main()
