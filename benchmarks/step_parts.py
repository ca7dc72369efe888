"""Splits the time of the engine's steps into its parts, while a number of requests decode plainly.

Forward is the target's forward. Schedule, propose, decide and commit are the parts of `foredraft.engine.step` without it, and
rest is all else between two steps: outputs, locks and the caller. The figures are medians over the steps in which all requests
decode and no prompt is computed. The share is that of all time outside forwards in these steps.

    python benchmarks/step_parts.py --model build/chat-350m --output benchmarks/results/step-parts-350m.jsonl --profile
"""

from __future__ import annotations

import cProfile
import pstats
import random
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from measuring import arguments, median, report, rounded

from foredraft import LLM, SamplingParams
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.params import RequestOutputKind
from foredraft.engine.scheduler import Scheduler
from foredraft.engine.step import Step
from foredraft.kernels.sets import sets_here

PARTS = ("schedule", "propose", "forward", "decide", "commit", "rest")


class Parts:
    """Measures the seconds of the parts since the last `take`."""

    def __init__(self, llm: LLM):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        for owner, names in ((Scheduler, ("schedule",)), (Step, ("propose", "decide", "commit"))):
            for name in names:
                setattr(owner, name, self._timed(name, getattr(owner, name)))
        llm.target.forward = self._timed("forward", llm.target.forward)  # type: ignore[method-assign]

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            found = function(*args, **kwargs)
            self.seconds[part] += perf_counter() - began
            return found

        return run

    def take(self, seconds: float) -> dict[str, float]:
        """Returns the parts of a step that took `seconds`, and resets them."""
        found = {**self.seconds, "step": seconds, "rest": seconds - sum(self.seconds.values())}
        self.seconds = dict.fromkeys(PARTS, 0.0)
        return found


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=200, help="number of tokens of a prompt")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--profile", action="store_true", help="print the functions that take most time at the last number")
    given = parser.parse_args()
    llm = LLM(given.model, {"method": "ar"}, dtype=given.dtype, device=given.device, max_num_seqs=max(given.requests))
    parts, draw, rows = Parts(llm), random.Random(0), []
    for count in given.requests:
        prompts = [[draw.randrange(3, llm.target.vocab_size) for _ in range(given.prompt)] for _ in range(count)]
        sampling = SamplingParams(temperature=0.0, max_tokens=given.steps, ignore_eos=True).giving(RequestOutputKind.FINAL_ONLY)
        requests = [llm.engine.add_request(None, {"prompt_token_ids": prompt}, sampling) for prompt in prompts]
        steps, profile = list[dict[str, float]](), cProfile.Profile()
        last = perf_counter()
        while llm.engine.has_unfinished_requests():
            ready = all(request.sequences[0].records for request in requests)
            if given.profile and count == given.requests[-1] and len(steps) == given.steps // 2:
                profile.enable()
            llm.engine.step()
            now = perf_counter()
            found, last = parts.take(now - last), now
            if ready and not any(request.is_finished for request in requests):
                steps.append(found)
        profile.disable()
        plain = steps[: given.steps // 2] if given.profile else steps
        row: dict[str, Any] = {"model": (given.model or BUNDLED_TARGET.name).rsplit("/", 1)[-1], "requests": count}
        row |= {f"{name}_ms": 1e3 * median([step[name] for step in plain]) for name in ("step", *PARTS)}
        row["outside_share"] = 1 - sum(step["forward"] for step in plain) / sum(step["step"] for step in plain)
        rows.append(rounded({**row, "steps": len(plain), "sets": sets_here()}))
    columns = ["model", "requests", *(f"{name}_ms" for name in ("step", *PARTS)), "outside_share", "steps"]
    report(given.output, rows, columns, device=torch.device(llm.target.device), dtype=given.dtype)
    if given.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
