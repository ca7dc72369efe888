"""Measures engines under load: the throughput with 16 requests running, and the times of requests that arrive at random.

    python benchmarks/to_gguf.py --model DIR
    python benchmarks/load.py --model DIR --llama-server FILE --vllm-python FILE --output FILE

Every engine has a process of its own and as many threads as cores. The engines take turns, in an order that rotates, and a
waiting engine is stopped. All get the same requests, decode greedily, and run at most 16 requests at once. Prompts are random
token ids, and none is used twice.

*Closed loop*: 16 requests are unfinished all the time. The throughput counts the tokens that are delivered between the end of
the first request and the start of the last one. *Poisson arrivals*: requests arrive at 0.5, 0.8 and 1.2 times the rate at which
foredraft ended requests in the closed loop of the same round.

A row of the output is one turn. *First token* is the time from the arrival of a request to its first delivery. *Token* is the
time from the first to the last delivery, divided by the number of tokens after the first. *Gap* is the time between two
deliveries. The printed tables cover all rounds of the output file. ``--continue`` keeps the rounds that the file has already.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from time import sleep
from typing import Any

import torch
from measuring import arguments, median, report, rotated, rounded, rounds

from foredraft.bench.peer_process import vllm_environment
from foredraft.kernels import cpu_flags
from foredraft.models.checkpoint import read_config

NUM_SEQS, PROMPTS, ANSWERS = 16, (16, 512), (16, 256)
"""Requests that run at once, and the least and the largest numbers of tokens of prompts and answers."""

MAX_LEN = PROMPTS[1] + ANSWERS[1]
RATES = (0.5, 0.8, 1.2)
"""Rates of arrival, relative to our capacity."""

REST_S = 0.3
"""Pause in seconds after a turn. Threads keep spinning for a while and would slow down the next engine."""

DISTURBED = 0.1
"""The share of the processors' time that other processes may use in a turn."""

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
"""Features of a processor that are written beside the figures."""

TIMES = ("first_token_s", "token_s", "gap_s")
SHARES = {"p50": 0.5, "p95": 0.95}


class Engine:
    """An engine in its own process, see load_process.py. The process and its children are stopped between two turns."""

    def __init__(self, name: str, kind: str, options: dict[str, Any], *, python: str = sys.executable, env: Any = None):
        self.name = name
        command = [python, str(Path(__file__).with_name("load_process.py")), kind, json.dumps(options)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log, "text": True}
        self._process = subprocess.Popen(command, env=env, process_group=0, **pipes)
        self.facts = self._answer()
        self._signal(signal.SIGSTOP)

    def turn(self, ask: dict[str, Any]) -> tuple[list[Any], float]:
        """Runs requests. Returns the arrival and the deliveries of each, and the share of time that others used."""
        self._signal(signal.SIGCONT)
        before = ticks(self._process.pid)
        print(json.dumps(ask), file=self._process.stdin, flush=True)
        requests = self._answer()["requests"]
        every, busy, own = (new - old for old, new in zip(before, ticks(self._process.pid), strict=True))
        sleep(REST_S)
        self._signal(signal.SIGSTOP)
        for (_, deliveries), limit in zip(requests, ask["limits"], strict=True):
            count = sum(tokens for _, tokens in deliveries)
            if count != limit:
                raise RuntimeError(f"{self.name} generated {count} tokens instead of {limit}")
        return requests, max(0.0, (busy - own) / max(1, every))

    def close(self) -> None:
        """Ends the process and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            printed = [row.rstrip() for row in self._log.read().splitlines() if row.strip()]
            raise RuntimeError(f"{self.name} stopped:\n" + "\n".join(printed[-20:]))
        return json.loads(line)


def undisturbed(engine: Engine, ask: dict[str, Any], tries: int) -> tuple[list[Any], float]:
    """Takes a turn, and repeats it while other processes disturb it, up to `tries` runs. Returns the least disturbed run."""
    found = [engine.turn(ask)]
    while found[-1][1] > DISTURBED and len(found) < tries:
        found.append(engine.turn(ask))
    return min(found, key=lambda turn: turn[1])


def ticks(group: int) -> tuple[int, int, int]:
    """Returns the ticks of all processors, those in which they worked, and those of a process group (Linux)."""
    own = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended meanwhile
            fields = (folder / "stat").read_text().rsplit(") ", 1)[1].split()
            own += (int(fields[11]) + int(fields[12])) * (int(fields[2]) == group)
    every = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(every), sum(every) - every[3] - every[4], own


def starts(given: Any) -> dict[str, Callable[[], Engine]]:
    """Returns the engines that can take part, by name. The first one is foredraft with plain decoding."""
    model = given.model.resolve()
    common = {"model": str(model), "dtype": given.dtype, "max_num_seqs": NUM_SEQS, "max_model_len": MAX_LEN}
    plain = {**common, "config": {"method": "ar"}}
    found: dict[str, Callable[[], Engine]] = {"foredraft": lambda: Engine("foredraft", "foredraft", plain)}
    for rows in given.rows:
        name, limited = f"foredraft, {rows} rows", {**plain, "options": {"max_num_batched_tokens": rows}}
        found[name] = lambda name=name, limited=limited: Engine(name, "foredraft", limited)
    if given.vllm_python:
        python = given.vllm_python.absolute()
        preload = {"LD_PRELOAD": given.vllm_preload} if given.vllm_preload else {}
        env = vllm_environment({**os.environ, **preload}, str(python.parents[1]))
        found["vLLM"] = lambda: Engine("vLLM", "vllm", common, python=str(python), env=env)
    if given.llama_server:
        options = {**common, "program": str(given.llama_server.absolute())}
        for weights in ("bf16", "f16"):
            file = {"file": str(model / f"model-{weights}.gguf")}
            name = f"llama.cpp {weights.upper()}"
            found[name] = lambda name=name, file=file: Engine(name, "llama.cpp", {**options, **file})
    return found


def log_uniform(draw: random.Random, count: int, low: int, high: int) -> list[int]:
    """Returns `count` quantiles of a law whose logarithm is uniform from `low` to `high`, in random order."""
    found = [round(low * (high / low) ** ((at + 0.5) / count)) for at in range(count)]
    draw.shuffle(found)
    return found


def workload(seed: str, count: int, vocab: int, per_s: float | None) -> dict[str, Any]:
    """Makes requests. With `per_s`, they arrive as a Poisson process of this rate, given that it has `count` arrivals."""
    draw = random.Random(seed)
    prompts, limits = log_uniform(draw, count, *PROMPTS), log_uniform(draw, count, *ANSWERS)
    arrivals = per_s and sorted(draw.uniform(0, count / per_s) for _ in range(count))
    ids = [[draw.randrange(3, vocab) for _ in range(length)] for length in prompts]
    return {"prompts": ids, "limits": limits, "arrivals": arrivals, "at_once": NUM_SEQS}


def throughput(requests: Sequence[Any]) -> float:
    """Returns the tokens per second of a closed loop while all places are taken."""
    begin = min(deliveries[-1][0] for _, deliveries in requests)
    end = max(arrived for arrived, _ in requests)
    count = sum(tokens for _, deliveries in requests for at, tokens in deliveries if begin < at <= end)
    return count / (end - begin)


def quantile(values: Sequence[float], share: float) -> float:
    """Returns the least value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def times(requests: Sequence[Any]) -> dict[str, float]:
    """Makes the columns of the times of requests."""
    found: dict[str, list[float]] = {name: [] for name in TIMES}
    for arrived, deliveries in requests:
        moments, count = [at for at, _ in deliveries], sum(tokens for _, tokens in deliveries)
        found["first_token_s"].append(moments[0] - arrived)
        found["token_s"].append((moments[-1] - moments[0]) / max(1, count - deliveries[0][1]))
        found["gap_s"] += [after - before for before, after in pairwise(moments)]
    return {f"{name}_{short}": quantile(values, share) for name, values in found.items() for short, share in SHARES.items()}


def measure(engines: Sequence[Engine], given: Any, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
    """Runs the rounds, and yields a row for each turn."""
    vocab = read_config(given.model).vocab_size
    for engine in engines:  # the first turn compiles and allocates
        ask = workload("warm-up", NUM_SEQS, vocab, None)
        engine.turn({**ask, "limits": [8] * NUM_SEQS})
    for number in numbers:
        capacity = given.capacity
        for load in ("closed", *given.rates):
            per_s = None if load == "closed" else load * capacity
            ask = workload(f"{given.seed} {number} {load}", given.requests, vocab, per_s)
            mean = sum(ask["limits"]) / len(ask["limits"])
            for engine in rotated(engines, number):
                requests, others = undisturbed(engine, ask, given.tries)
                row = {"model": given.model.name, "engine": engine.name, "round": number, "load": load}
                row |= {"requests_per_s": per_s} if per_s else {"tokens_per_s": throughput(requests)}
                row |= {**times(requests), "requests": given.requests, **engine.facts}
                row |= {"seconds": max(deliveries[-1][0] for _, deliveries in requests), "others_share": others}
                if not per_s and engine is engines[0]:
                    capacity = capacity or row["tokens_per_s"] / mean
                print(line(row), file=sys.stderr, flush=True)
                yield rounded(row)


def line(row: dict[str, Any]) -> str:
    """Describes a turn in a line."""
    cells = [f"{name} {1e3 * row[f'{name}_p50']:.0f} / {1e3 * row[f'{name}_p95']:.0f} ms" for name in TIMES]
    speed = f"{row['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in row else f"{row['requests_per_s']:.2f} requests/s"
    return (
        f"round {row['round']}, {row['load']}, {row['engine']}: {speed}, {', '.join(cells)}, others {row['others_share']:.0%}"
    )


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Formats the median of the rounds with their extremes."""
    low, middle, high = (f"{scale * value:.{digits}f}" for value in (min(values), median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def summary(rows: Sequence[dict[str, Any]], load: Any) -> list[dict[str, Any]]:
    """Makes the printed rows of one load: medians of the rounds, and how many times as good foredraft was in them."""
    ours = {row["round"]: row for row in rows if row["engine"] == "foredraft" and row["load"] == load}
    others = [row for row in rows if row["load"] == load and row["round"] in ours]
    names = ["tokens_per_s"] if load == "closed" else []
    found = []
    for name in names + [f"{name}_{short}" for name in TIMES for short in SHARES]:
        cells: dict[str, Any] = {"load": str(load), "figure": name.replace("_s_", "_ms_")}
        is_time = name != "tokens_per_s"
        for engine in dict.fromkeys(row["engine"] for row in rows):
            turns = [row for row in others if row["engine"] == engine]
            pairs = [(ours[row["round"]][name], row[name]) for row in turns]
            cells[engine] = spread([row[name] for row in turns], 1e3 if is_time else 1, 0) if turns else None
            if engine != "foredraft":
                ratios = [theirs / mine if is_time else mine / theirs for mine, theirs in pairs]
                cells[f"times as good as {engine}"] = spread(ratios) if turns else None
        found.append(cells)
    return found if ours else []


def main() -> None:
    """Measures, writes and prints."""
    parser = arguments(__doc__, models=False, minutes=12)
    parser.add_argument("--model", type=Path, required=True, help="directory of a Llama-family model")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's program of this name; without it llama.cpp is left out")
    parser.add_argument("--vllm-python", type=Path, help="Python that has vLLM installed; without it vLLM is left out")
    parser.add_argument("--vllm-preload", help="libraries that vLLM preloads, such as tcmalloc, separated by colons")
    parser.add_argument("--engines", nargs="+", help="names of the engines; default: all, llama.cpp with BF16 only")
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="also run foredraft with these rows of a step")
    parser.add_argument("--requests", type=int, default=64, help="requests of a turn")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES, help="arrivals relative to the capacity of foredraft")
    parser.add_argument("--capacity", type=float, help="capacity in requests a second; default: of the round's closed loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=2, help="at most so many runs of a turn that other processes disturb")
    parser.add_argument("--seed", type=int, default=0, help="seed of lengths, prompts and arrivals")
    parser.add_argument("--continue", dest="added", action="store_true", help="keep the rounds that the output has already")
    given = parser.parse_args()
    known = starts(given)
    names = given.engines or [name for name in known if name != "llama.cpp F16"]
    if unknown := [name for name in ["foredraft", *names] if name not in known]:
        parser.error(f"--engines: {unknown[0]!r} is not among {', '.join(known)}")
    rows = [json.loads(row) for row in given.output.read_text().splitlines()] if given.added and given.output.exists() else []
    first, engines = 1 + max((row["round"] for row in rows), default=-1), []
    features = {"processor_features": " ".join(name for name in FLAGS if name in cpu_flags())}
    try:
        engines += [known[name]() for name in names]
        numbers = (first + number for number in rounds(given.rounds, given.minutes))
        rows += [{**row, **features} for row in measure(engines, given, numbers)]
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    finally:
        for engine in engines:
            engine.close()
    shown = [cells for load in dict.fromkeys(row["load"] for row in rows) for cells in summary(rows, load)]
    report(given.output, rows, list(shown[0]) if shown else [], device=torch.device("cpu"), dtype=given.dtype, shown=shown)


if __name__ == "__main__":
    main()
