"""Draft heads side by side, on prompts of the six task families of Spec-Bench.

    python benchmarks/heads.py --data ../shared/data/eval --output benchmarks/heads-14m-greedy.jsonl \
        eagle=build/heads/eagle:topk:16 fspad=build/heads/fspad:topk:16 ctc=build/heads/ctc::16

A method is spelled as in `foredraft bench`; all take turns on every prompt, against plain decoding. Prompts over 448 tokens are
cut in the middle. Beside the figures of `foredraft bench`, a row has the tokens per step of every family and of the prompts
whose plain output does not loop, the speed-up of the steps alone (without the prompts' own pass) and, in plain decoding's row,
that of steps which take no time (`speedup_most`: the prompts' own pass is left), forwards and milliseconds of drafting a step,
parameters and training minutes of the head.
`transformers` among the methods is that library's own plain decoding, which then takes turns too; every row says what it gains
over that (`speedup_over`: in all, and where nothing loops, each with the ends of its interval).
With `--no-times` a row has no figure that hangs on the clock, and no forwards: for heads that are measured while others train.
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
from foredraft.bench.command import BenchChoice, contender
from foredraft.bench.names import parse_method
from foredraft.bench.report import rows_of, speedup
from foredraft.bench.run import Outcome, measure
from foredraft.drafters.folder import read_head
from foredraft.metrics import summarize
from foredraft.progress import progress_bar
from foredraft.speculation import PLAIN

FAMILIES = ("chat", "translation", "summarization", "qa", "math_reasoning", "rag")
"""Of Spec-Bench; the eight categories of MT-bench are `chat`."""

LONGEST = 448
PEER = "transformers"
COLUMNS = (
    *("name", "parameters", "minutes", "acceptance_length", "not_looping", "speedup", "speedup_low", "speedup_high"),
    *("speedup_not_looping", "draft_forwards", "draft_ms", "verify_ms"),
)


class Task(NamedTuple):
    """A prompt of a family, as token ids."""

    family: str
    ids: list[int]
    was_cut: bool


def read_tasks(llm: LLM, data: Path, count: int) -> list[Task]:
    """`count` prompts, as many of each family as can be, at equal distances within it; the families in turn."""
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
    """At most `LONGEST` tokens, the first and the last ones."""
    if len(ids) <= LONGEST:
        return ids
    return [*ids[: LONGEST // 2], *ids[-(LONGEST - LONGEST // 2) :]]


@contextmanager
def counted(drafter: Any) -> Iterator[list[int]]:
    """Gives a list that holds the forwards of the drafter meanwhile: calls of the head on rows of new nodes or slots."""
    calls = [0]
    whole = getattr(drafter, "slots", drafter)  # parallel heads are run once, by `fill`, and only looked up by `expand`
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
    """Forwards of the drafter in a step, over some prompts."""
    with counted(llm.engine.drafter) as calls:
        outputs = llm.generate(list(prompts), sampling)
    return calls[0] / max(sum(one.metrics.num_steps for one in outputs), 1)


def lengths(outcomes: Sequence[Outcome]) -> float | None:
    """Tokens per step."""
    records = [record for one in outcomes for request in one.records for record in request]
    return summarize(records).acceptance_length if records else None


def made(config: dict[str, Any]) -> dict[str, Any]:
    """What is known of a head: its parameters, and what its training took if its files say so."""
    folder = Path(str(config.get("model")))
    if not folder.is_dir():
        return {}
    found = {"parameters": sum(one.numel() for one in read_head(folder).head.parameters())}
    file = folder / "provenance.json"
    about = json.loads(file.read_text()) if file.is_file() else {}
    return found | {key: about[key] for key in ("minutes", "token_passes") if key in about}


def step_seconds(outcomes: Sequence[Outcome]) -> float:
    """Seconds in the steps alone: without the prompt's own pass, which all methods share."""
    return sum(getattr(one, f"{part}_s") for one in outcomes for part in ("draft", "verify", "rule", "cache"))


def of_steps(plain: Sequence[Outcome], outcomes: Sequence[Outcome]) -> float:
    """Speed-up of the steps alone, a token."""
    before, after = (step_seconds(some) / sum(one.num_tokens for one in some) for some in (plain, outcomes))
    return before / after


def at_most(plain: Sequence[Outcome]) -> float:
    """Speed-up of steps that take no time, in which only the prompt's own pass is left."""
    whole = sum(one.seconds for one in plain)
    return whole / (whole - step_seconds(plain))


def over_peer(peer: Sequence[Outcome], outcomes: Sequence[Outcome], quiet: Sequence[int]) -> dict[str, Any]:
    """Speed-up over a peer, and the same on the prompts `quiet` alone, each with the ends of its interval."""
    chosen = {"all": range(len(peer)), "not_looping": quiet}
    return {name: speedup([peer[i] for i in some], [outcomes[i] for i in some]) for name, some in chosen.items() if some}


def is_time(key: str) -> bool:
    """Whether a column of a row hangs on the clock."""
    return key.endswith(("_s", "_ms")) or key.startswith(("speedup", "ms_"))


def compared(row: dict[str, Any], rounds: Sequence[dict[str, Outcome]], quiet: Sequence[int]) -> dict[str, Any]:
    """What a row says beside that of `foredraft bench`: its speed in other parts of the time, on other prompts, over others."""
    name, found = row["name"], dict[str, Any]()
    outcomes, plainly = ([one[key] for one in rounds] for key in (name, PLAIN))
    few, few_plainly = ([some[i] for i in quiet] for some in (outcomes, plainly))
    if PEER in rounds[0]:
        found["speedup_over"] = {PEER: over_peer([one[PEER] for one in rounds], outcomes, quiet)}
    if name != PEER:  # nobody sees the steps of a peer
        found["speedup_steps"] = of_steps(plainly, outcomes)
        found |= {"speedup_steps_not_looping": of_steps(few_plainly, few)} if quiet else {}
    if name == PLAIN and quiet:
        found |= {"speedup_most": at_most(plainly), "speedup_most_not_looping": at_most(few_plainly)}
    return found | {"not_looping": lengths(few)}


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("methods", nargs="+", help=f"drafter=DIRECTORY:tree:budget, or {PEER}")
    parser.add_argument("--data", type=Path, required=True, help="folder of evaluation prompts")
    parser.add_argument("--model", help="directory of the target; the bundled one if not given")
    parser.add_argument("--count", type=int, default=100, help="prompts in all")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-times", action="store_true", help="tokens a step alone: the machine need not be quiet")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if not (args.data / "spec_bench.jsonl").is_file():
        parser.error(f"no spec_bench.jsonl in {str(args.data)!r}: give the folder of evaluation prompts as --data")
    if args.no_times and PEER in args.methods:
        parser.error(f"{PEER} is there for its speed alone: leave it out, or --no-times")
    return args


def main() -> None:
    """Command line."""
    args = arguments()
    plain = LLM(args.model, {"method": PLAIN}, dtype=args.dtype, max_num_seqs=1)
    sampling = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=0)
    every = read_tasks(plain, args.data, args.count)
    warm_up = tasks.encode(plain, tasks.WARM_UP, raw=False)
    configs = {name: parse_method(name, None) for name in args.methods if name != PEER}
    choice = BenchChoice("", args.data, model=args.model)
    names, rounds = dict.fromkeys([PLAIN, *args.methods]), []
    with ExitStack() as stack, progress_bar("measuring", len(every)) as advance:
        contenders = [contender(name, plain, choice, warm_up, sampling, stack) for name in names]
        for outcome in measure(contenders, [task.ids for task in every], sampling, batch_size=1, warm_up=warm_up):
            rounds.append(outcome)
            advance(1)
    quiet = [i for i, one in enumerate(rounds) if not tasks.is_looping(one[PLAIN].token_ids[0])]
    rows = rows_of(contenders, rounds, args.temperature)
    for row in rows:
        row |= compared(row, rounds, quiet)
        row |= {"weights_mb": plain.target.num_weight_bytes / 1e6, **made(configs.get(row["name"], {}))}
        outcomes = [one[row["name"]] for one in rounds]
        row["families"] = {
            family: lengths([one for one, task in zip(outcomes, every, strict=True) if task.family == family])
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
