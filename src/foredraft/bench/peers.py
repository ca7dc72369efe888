"""Peers: other engines on the same weights, each in its own process.

They are Transformers, plain and with an assistant, and vLLM, plain and with n-gram drafts.
"""

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

from foredraft.bench.names import ASSISTED_PEERS
from foredraft.bench.run import Outcome
from foredraft.core.params import SamplingParams

_REST_S = 0.2
"""Pause in seconds after a peer's run. OpenMP threads keep spinning for a while and would slow down the next method."""

_TUNING_TOKENS = 32


class Peer:
    """Another engine in its own process, with its fastest setting.

    Args:
        kind: a name in PEERS.
        model: directory of the target.
        draft_model: directory of the assistant; None for other peers.
        dtype: torch's name of the dtype.
        device: torch's name of the device.
        max_len: largest number of tokens of prompt and output together.
        eos_ids: token ids that end a sequence.
        tuning: prompts (token ids) on which the setting is chosen. They are never reported.
        sampling: sampling parameters of the benchmark.
        python: Python interpreter that has the engine installed.

    Raises:
        RuntimeError: the engine does not start, or it fails. The message quotes the last line of its output.
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
        draft = draft_model or "" if kind in ASSISTED_PEERS else ""
        command = [python, str(Path(__file__).with_name("peer_process.py")), kind, model, draft, dtype, device, str(max_len)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self.setting: dict[str, Any] = {}
        self.setting = self._fastest(self._answer()["settings"], tuning, sampling)

    def run(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> Outcome:
        """Generates for a batch, see `Contender`. An assisted engine takes one prompt at a time."""
        groups = [[prompt] for prompt in prompts] if self.name in ASSISTED_PEERS else [list(prompts)]
        answers = [self._ask(group, sampling[0]) for group in groups]
        sleep(_REST_S)
        token_ids = [ids for answer in answers for ids in answer["token_ids"]]
        return Outcome(sum(answer["seconds"] for answer in answers), token_ids)

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
            answers = [self._ask([prompt], sampling) for prompt in tuning]
            num_tokens = sum(len(answer["token_ids"][0]) for answer in answers)
            costs.append(sum(answer["seconds"] for answer in answers) / num_tokens)
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
            pass  # `_answer` reports the missing answer
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            printed = [row.strip() for row in self._log.read().splitlines() if row.strip()]
            raise RuntimeError(f"the peer {self.name!r} stopped: {printed[-1] if printed else 'it printed nothing'}")
        return json.loads(line)
