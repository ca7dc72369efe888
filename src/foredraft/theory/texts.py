"""The texts of a target to which predictions and estimates apply, and the pair of models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foredraft.bench import tasks
from foredraft.core.errors import UserError, whole_number
from foredraft.core.params import SamplingParams, check_seed
from foredraft.llm import LLM
from foredraft.plan.config import drafter_alone

_MOST_REPEATS = 10_000


@dataclass(frozen=True)
class Texts:
    """The texts to generate, and the pair of models.

    Attributes:
        prompts: file of prompts.
        model: the target; None: the bundled one.
        draft_model: directory of a draft model or head; None: the bundled one.
        limit: largest number of prompts.
        temperature: temperature, above 0.
        max_tokens: number of tokens of each text.
        repeats: number of texts for each prompt.
        dtype: dtype of the models.
        raw: whether prompts bypass the chat template.
        seed: seed of the texts.

    Raises:
        ValueError: a value is invalid.
    """

    prompts: Path
    model: str | None = None
    draft_model: str | None = None
    limit: int | None = None
    temperature: float | int = 1.0
    max_tokens: int = 64
    repeats: int = 1
    dtype: str = "auto"
    raw: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError("laws need a temperature above 0", "At 0, every rejection is certain or impossible")
        if self.repeats < 1:
            raise UserError(f"repeats must be at least 1, got {self.repeats}")
        whole_number("repeats", self.repeats, 1, _MOST_REPEATS, "all texts are held in memory until the last is finished")
        check_seed(self.seed, "--seed")
        _ = self.sampling  # raises its errors now

    @property
    def sampling(self) -> SamplingParams:
        """Sampling parameters, with which every text has `max_tokens` tokens."""
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, ignore_eos=True)

    @property
    def drafting(self) -> dict[str, Any]:
        """Speculative config, without a tree."""
        return drafter_alone(self.draft_model)

    def load(self) -> LLM:
        """Loads the target, for plain decoding."""
        tasks.read_prompts(self.prompts, self.limit)  # raises its errors before the model is loaded
        return LLM(self.model, {"method": "ar"}, dtype=self.dtype, max_num_seqs=8, seed=self.seed)

    def encoded(self, llm: LLM) -> list[list[int]]:
        """Encodes the prompts that fit in the context, `repeats` times.

        Raises:
            ValueError: no prompt fits.
        """
        read = tasks.read_prompts(self.prompts, self.limit)
        raw = self.raw or llm.tokenizer.chat_template is None
        return tasks.encode_fitting(llm, read, self.max_tokens, raw=raw) * self.repeats
