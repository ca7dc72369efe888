"""Other engines on the same weights, each in its own process: Transformers plain and assisted, vLLM plain and with n-grams."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

from foredraft.bench.run import Outcome
from foredraft.params import SamplingParams

_REST_S = 0.2
"""A pause after a peer's run: the threads of OpenMP go on spinning for a while and would disturb who comes next."""

_TUNING_TOKENS = 32


class Peer:
    """Another engine, tuned on `tuning` prompts (never on those that are reported) to its fastest setting.

    Args:
        kind: one of PEERS.
        model, draft_model: directories.
        dtype, device: as torch names them.
        eos_ids: ends of sequence.
        python: the interpreter that has the engine installed.
        tuning: prompts, as token ids, to choose the setting on.

    Raises:
        RuntimeError: the engine does not start, or fails; the end of what it printed is in the message.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        draft_model: str | None,
        *,
        dtype: str,
        device: str,
        max_len: int,
        eos_ids: Sequence[int],
        tuning: Sequence[list[int]],
        sampling: SamplingParams,
        python: str = sys.executable,
    ):
        self.name, self._eos_ids = kind, list(eos_ids)
        draft = draft_model or "" if kind == "transformers-assisted" else ""
        command = [python, str(Path(__file__).with_name("peer_process.py")), kind, model, draft, dtype, device, str(max_len)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self.setting: dict[str, Any] = {}
        self.setting = self._fastest(self._answer()["settings"], tuning, sampling)

    def run(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> Outcome:
        """See `Contender`. An assisted engine takes one prompt at a time."""
        groups = [[one] for one in prompts] if self.name == "transformers-assisted" else [list(prompts)]
        answers = [self._ask(group, sampling[0]) for group in groups]
        sleep(_REST_S)
        return Outcome(sum(one["seconds"] for one in answers), [ids for one in answers for ids in one["token_ids"]])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _fastest(self, settings: list[dict[str, Any]], tuning: Sequence[list[int]], sampling: SamplingParams) -> dict[str, Any]:
        if len(settings) == 1:
            return settings[0]
        costs, sampling = [], replace(sampling, max_tokens=min(_TUNING_TOKENS, sampling.max_tokens or _TUNING_TOKENS))
        for setting in settings:
            self.setting = setting
            self._ask([tuning[0]], sampling)
            answers = [self._ask([one], sampling) for one in tuning]
            costs.append(sum(one["seconds"] for one in answers) / sum(len(one["token_ids"][0]) for one in answers))
        return settings[costs.index(min(costs))]

    def _ask(self, prompts: Sequence[list[int]], sampling: SamplingParams) -> dict[str, Any]:
        question = {
            "prompts": list(prompts),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "eos": [] if sampling.ignore_eos else self._eos_ids,
            "seed": sampling.seed or 0,
            "setting": self.setting,
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer is reported
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = [row.strip() for row in self._log.read().splitlines() if row.strip()]
            raise RuntimeError(f"the peer {self.name!r} stopped: {said[-1] if said else 'it printed nothing'}")
        return json.loads(line)
