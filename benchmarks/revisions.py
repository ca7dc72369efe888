"""Compares the time of a step between two checkouts of this repository, in pairs, and their tokens at equal seeds.

Each checkout runs in a process of its own. The processes take turns at each prompt; one sleeps while the other runs. A pair
is the ratio of the times of a step on one prompt. The prompts are encoded by the bundled tokenizer.

Where a process has its memory makes it a few percent faster or slower for its whole life. So both processes are started anew
several times. The interval is that of the median of all pairs (bootstrap over starts, then over the pairs of a start, 95 %).

    python benchmarks/revisions.py --before CHECKOUT --model DIR --output FILE
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

METHODS = ("ar", "fspad:dyspec:8", "lm:dyspec:8", "suffix")
HERE = Path(__file__).resolve().parents[1]
PAUSE_S = 0.02
"""Seconds after which the threads of the other process sleep."""


def config_of(method: str, models: dict[str, str]) -> dict[str, Any]:
    """Makes the speculative config of ``method:tree:nodes``."""
    name, *rest = method.split(":")
    config: dict[str, Any] = {"method": name}
    if name != "ar":
        config["num_speculative_tokens"] = int(rest[1]) if len(rest) > 1 else 8
    if rest:
        config["tree"] = rest[0]
    if name in models:
        config["model"] = models[name]
    return config


def work(given: dict[str, Any]) -> None:
    """Answers requests on the standard input, a line each: a method, the number of a prompt, a temperature.

    It uses only what both checkouts have: `LLM`, `SamplingParams` and the outputs.
    """
    from foredraft import LLM, SamplingParams

    shares = {"enable_prefix_caching": False} if Path("src/foredraft/cache/prefixes.py").exists() else {}  # prompts recur
    llm = LLM(given["model"], {"method": "ar"}, dtype=given["dtype"], device="cpu", max_num_seqs=1, **shares)
    llms = {method: llm.with_speculation(config_of(method, given["models"])) for method in METHODS}
    print("ready", flush=True)
    for line in sys.stdin:
        method, number, temperature = json.loads(line)
        params = SamplingParams(temperature=temperature, max_tokens=given["tokens"], seed=number, ignore_eos=True)
        began = perf_counter()
        [output] = llms[method].generate([{"prompt_token_ids": given["prompts"][number]}], params)
        seconds = perf_counter() - began
        print(json.dumps([seconds / output.metrics.num_steps, list(output.outputs[0].token_ids)]), flush=True)


class Checkout:
    """A process that runs a checkout. `script` is started in it with ``--worker``; it prints a line when it is ready."""

    def __init__(self, folder: Path, given: dict[str, Any], script: Path = Path(__file__)):
        environment = os.environ | {"PYTHONPATH": str(folder / "src")}
        command = [sys.executable, str(script.resolve()), "--worker", json.dumps(given)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)  # type: ignore[call-overload]
        self.pid = self._process.pid
        self.ask()

    def ask(self, *question: Any) -> Any:
        """Sends a question, if any, and returns the answer."""
        if question:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("error: a checkout's process ended")
        return json.loads(answer) if question else None

    def stop(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def interval(*groups: list[float]) -> tuple[float, float, float]:
    """Returns the median of all pairs and its 95 % interval.

    Args:
        groups: the pairs of each start of the processes.
    """
    draw = random.Random(0)

    def middle(some: Iterable[list[float]]) -> float:
        pairs = sorted(chain.from_iterable(some))
        return pairs[len(pairs) // 2]

    medians = sorted(
        middle([draw.choices(group, k=len(group)) for group in draw.choices(groups, k=len(groups))]) for _ in range(2000)
    )
    return middle(groups), medians[50], medians[1949]


def main() -> None:
    """Measures, writes and prints."""
    import torch
    from measuring import arguments, median, read_prompts, report, rounded, rounds

    from foredraft import LLM

    parser = arguments(__doc__, minutes=8)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, whose kernels are built")
    parser.add_argument("--fspad", help="directory of the FSPAD head; default: the bundled one")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3, help="rounds over the prompts after each start")
    parser.add_argument("--starts", type=int, default=6, help="starts of both processes")
    given = parser.parse_args()
    if given.device not in (None, "cpu"):
        parser.error("--device: only a CPU is compared")
    bundled = HERE / "src" / "foredraft" / "bundled"
    model = str(Path(given.model or bundled / "chat-14m").resolve())
    models = {"lm": str(Path(given.draft_model).resolve()), "fspad": str(Path(given.fspad or bundled / "fspad").resolve())}
    prompts = read_prompts(LLM(speculative_config={"method": "ar"}), given.prompts)
    setting = {"model": model, "models": models, "prompts": prompts, "tokens": given.max_tokens, "dtype": given.dtype}
    seconds: dict[tuple[str, float], list[list[tuple[float, float]]]] = defaultdict(list)
    equal: dict[tuple[str, float], dict[int, bool]] = defaultdict(dict)
    for number in rounds(given.starts * given.rounds, given.minutes):
        if number % given.rounds == 0:
            checkouts = [Checkout(given.before.resolve(), setting), Checkout(HERE, setting)]
        for method, temperature in product(METHODS, (0.0, 1.0)):
            seconds[method, temperature] += [] if number % given.rounds else [[]]
            for prompt in range(given.prompts):
                answers = {}
                for which in (0, 1) if number % 2 else (1, 0):
                    sleep(PAUSE_S)
                    answers[which] = checkouts[which].ask(method, prompt, temperature)
                seconds[method, temperature][-1].append((answers[0][0], answers[1][0]))
                equal[method, temperature][prompt] = answers[0][1] == answers[1][1]
        if (number + 1) % given.rounds == 0:
            for checkout in checkouts:
                checkout.stop()
    rows = []
    for (method, temperature), groups in seconds.items():
        middle, low, high = interval(*([after / before for before, after in group] for group in groups))
        pairs = [*chain.from_iterable(groups)]
        row = {
            "model": Path(model).name,
            "method": method,
            "temperature": temperature,
            "pairs": len(pairs),
            "starts": len(groups),
        }
        row |= {
            "before_ms": 1e3 * median([before for before, _ in pairs]),
            "after_ms": 1e3 * median([after for _, after in pairs]),
        }
        row |= {"ratio": middle, "ratio_low": low, "ratio_high": high}
        row |= {"equal_outputs": sum(equal[method, temperature].values()), "outputs": given.prompts}
        rows.append(rounded(row))
    columns = ["method", "temperature", "before_ms", "after_ms", "ratio", "ratio_low", "ratio_high", "equal_outputs", "outputs"]
    report(given.output, rows, columns, device=torch.device("cpu"), dtype=given.dtype)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(json.loads(sys.argv[-1]))
    else:
        main()
