"""``foredraft bench``: loads the models, measures the methods, and reports the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from foredraft.bench import report, tasks
from foredraft.bench.bandwidth import read_bandwidth, reading
from foredraft.bench.machine import machine
from foredraft.bench.names import PEERS, VLLM_PEERS, checked_names, parse_method
from foredraft.bench.peers import Peer
from foredraft.bench.run import Contender, Ours, measure
from foredraft.core.errors import whole_number
from foredraft.core.params import RANDOM_SEED, SamplingParams, check_seed, used_seed
from foredraft.core.progress import progress_bar
from foredraft.llm import BUNDLED_LM, BUNDLED_TARGET, LLM, MAX_NUM_SEQS
from foredraft.plan.config import PLAIN

_WIDTH = 140
"""Width of the table, in columns, if the output is not a terminal."""


@dataclass(frozen=True)
class BenchChoice:
    """The options of ``foredraft bench``; see its ``--help``."""

    methods: str
    prompts: Path
    model: str | None = None
    draft_model: str | None = None
    limit: int | None = None
    batch_size: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 128
    dtype: str = "auto"
    device: str | None = None
    raw: bool = False
    ignore_eos: bool = False
    vllm_python: str | None = None
    output: Path | None = None
    plot: bool = False
    json: bool = False
    seed: int = 0


def bench(choice: BenchChoice) -> int:
    """Runs the benchmark and returns the exit status.

    Raises:
        ValueError: a method, a file or a value is invalid. Nothing has been measured then.
    """
    whole_number("--batch-size", choice.batch_size, 1, MAX_NUM_SEQS, "at most so many outputs are decoded at the same time")
    names = checked_names(choice.methods, choice.model, choice.draft_model, choice.vllm_python)
    sampling = SamplingParams(
        temperature=choice.temperature,
        top_p=choice.top_p,
        max_tokens=choice.max_tokens,
        ignore_eos=choice.ignore_eos,
        seed=used_seed(check_seed(choice.seed, "--seed")),
    )
    read = tasks.read_prompts(choice.prompts, choice.limit)
    plain = LLM(choice.model, {"method": PLAIN}, dtype=choice.dtype, device=choice.device, max_num_seqs=choice.batch_size)
    prompts = tasks.encode(plain, read, raw=choice.raw)
    fitting = [ids for ids in prompts if len(ids) + choice.max_tokens <= plain.max_model_len]
    if not fitting:
        raise tasks.too_long(choice.max_tokens, plain.max_model_len)
    warm_up = tasks.encode(plain, tasks.WARM_UP, raw=choice.raw)
    bandwidth = read_bandwidth(plain.target.device)
    with ExitStack() as stack:
        contenders = [contender(name, plain, choice, warm_up, sampling, stack) for name in names]
        rounds = []
        with progress_bar("measuring", len(fitting)) as advance:
            for outcome in measure(contenders, fitting, sampling, batch_size=choice.batch_size, warm_up=warm_up):
                rounds.append(outcome)
                advance(choice.batch_size)
    rows = report.rows_of(contenders, rounds, choice.temperature)
    rows[0] |= reading(plain.target, [outcomes[PLAIN] for outcomes in rounds], bandwidth)
    environment = _environment(plain, choice, len(prompts) - len(fitting)) | {"seed": sampling.seed}
    _show(rows, environment, choice)
    return 0


def contender(
    name: str, plain: LLM, choice: BenchChoice, warm_up: Sequence[list[int]], sampling: SamplingParams, stack: ExitStack
) -> Contender:
    """Makes a method on the weights of `plain`, or a peer on the same weights. `stack` closes the peer's process."""
    if name not in PEERS:
        llm = plain if name == PLAIN else plain.with_speculation(parse_method(name, choice.draft_model))
        if (reason := llm.drafting(sampling)["reason"]) is not None:
            Console(stderr=True, highlight=False, soft_wrap=True).print(f"{name}: {reason}", markup=False)
        return Ours(name, llm, sampling)
    bundled = choice.model is None
    peer = Peer(
        name,
        str(BUNDLED_TARGET if bundled else choice.model),
        str(BUNDLED_LM) if bundled and choice.draft_model is None else choice.draft_model,
        dtype=str(plain.target.dtype).removeprefix("torch."),
        device=str(plain.target.device),
        max_len=plain.max_model_len,
        eos_ids=plain.eos_ids,
        tuning=warm_up,
        sampling=sampling,
        python=choice.vllm_python if name in VLLM_PEERS and choice.vllm_python else sys.executable,
    )
    stack.callback(peer.close)
    return peer


def _environment(plain: LLM, choice: BenchChoice, num_left_out: int) -> dict[str, Any]:
    """Collects the conditions of the measurement."""
    return {
        "command": "foredraft " + " ".join(sys.argv[1:]),
        "prompts": choice.prompts.name,
        "prompts_left_out": num_left_out,
        "batch_size": choice.batch_size,
        "max_tokens": choice.max_tokens,
        "top_p": choice.top_p,
        "dtype": str(plain.target.dtype).removeprefix("torch."),
        **machine(plain.target.device),
    }


def _show(rows: Sequence[dict[str, Any]], environment: dict[str, Any], choice: BenchChoice) -> None:
    lines = [json.dumps(row) for row in ({**row, **environment} for row in rows)]
    if choice.json:
        print("\n".join(lines))
    else:
        out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDTH)
        out.print(report.table_of(rows))
        out.print(f"{rows[0]['num_prompts']} prompts of {environment['prompts']}, temperature {choice.temperature:g}, ", end="")
        out.print(
            f"{environment['dtype']}, {environment['threads']} threads, {rows[0]['looping_share']:.0%} of plain outputs loop"
        )
        if choice.seed == RANDOM_SEED:
            out.print(f"seed {environment['seed']}")
        reads = "plain decoding reads {weights_mb} MB of weights per step, {read_gb_per_s} GB/s: "
        out.print(reads.format_map(rows[0]), end="")
        out.print("{bandwidth_share:.0%} of the {bandwidth_gb_per_s} GB/s that this machine reads".format_map(rows[0]))
    if choice.output is not None:
        choice.output.mkdir(parents=True, exist_ok=True)
        (choice.output / "bench.jsonl").write_text("\n".join(lines) + "\n")
    if choice.plot:
        folder = choice.output or Path()
        report.plot(
            rows, folder / "bench.svg", f"{environment['prompts']}, temperature {choice.temperature:g}, {environment['dtype']}"
        )
