"""A request and its outputs while they are generated."""

from __future__ import annotations

from collections.abc import Sequence as Items
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.prefixes import Trail
from foredraft.core.contracts import Budget
from foredraft.core.draws import Draws
from foredraft.core.errors import UserError
from foredraft.core.law import PrefixProcessor
from foredraft.core.metrics import StepRecord
from foredraft.core.output_kind import RequestOutputKind
from foredraft.core.outputs import CompletionOutput, Logprob, RequestOutput
from foredraft.core.params import SamplingParams
from foredraft.core.text import TextStream
from foredraft.core.tree import DraftTree
from foredraft.engine.pace import Pace


@dataclass(eq=False)
class Missed:
    """The last tokens of an output, which were committed in steps without drafting: where the features before each stand."""

    features: list[Float[Tensor, "_ w"] | None] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.rows)

    def add(self, features: Float[Tensor, "_ w"] | None, row: int) -> None:
        """Adds a token. Row `row` of `features` is the state at the root before it."""
        self.features.append(features)
        self.rows.append(row)

    def joined(self) -> Float[Tensor, "m w"] | None:
        """Returns one row of features per token; None if there are none."""
        pairs = zip(self.features, self.rows, strict=True)
        rows = [features[row : row + 1] for features, row in pairs if features is not None]
        return torch.cat(rows) if rows else None


class Mark(NamedTuple):
    """Where an unfinished output stands between two steps."""

    num_tokens: int
    text: tuple[str, list[int], str, int]
    cumulative_logprob: float
    num_records: int
    last_tree: DraftTree | None
    last_path: list[int]


@dataclass(eq=False)
class Sequence:
    """One output while it is generated. It waits, runs, may be preempted, and ends.

    Attributes:
        request: the request that it belongs to.
        index: number of the output within the request.
        token_ids: prompt and output so far. The last token is the root of the next tree.
        num_prompt: number of prompt tokens.
        max_len: maximum number of tokens of prompt plus output.
        draws: the random numbers of the output.
        eos_ids: end-of-sequence tokens; empty if they are ignored.
        processors: the parts of `sampling` that depend on the prefix.
        drafting: how it drafts, a `foredraft.engine.drafting.Drafting`; None for plain decoding.
        nodes: maximum number of nodes below the root of its trees; 0 means plain decoding.
        pace: changes the number of nodes from step to step, within `nodes`; None keeps it.
        text: the text of the output so far.
        kinds: per output token ``accepted``, ``recovered``, ``bonus``, or ``plain`` if nothing was drafted.
        cache: the target's cache; None unless the sequence runs.
        trail: how far its blocks are published for other requests that draft as it does; None if they are not.
        plain_trail: how far they are published for requests that do not draft; None if they are not, or if `trail` says it.
        owed: the budget of a tree that was given up for lack of blocks. The same tree is drafted when the sequence runs again.
        has_run: whether it was ever admitted.
        first: number of tokens whose keys and values another request left in its blocks.
        features: the target's features of the tokens in the cache, in parts, until the drafter has started.
        missed: what the drafter is told before it drafts again.
        draft_state: the drafter's state; None before it has started, and if nothing is drafted.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``; None while the output runs.
        error: why the output ended with ``error``.
        cause: the exception behind `error` if it was not a mistake of the user.
        last_tree: the tree of the latest step.
        last_path: the accepted nodes of `last_tree`.
        told: numbers of tokens, characters and records that were given out already; see `RequestOutputKind.DELTA`.
    """

    request: Request
    index: int
    token_ids: list[int]
    num_prompt: int
    max_len: int
    sampling: SamplingParams
    draws: Draws
    text: TextStream
    eos_ids: frozenset[int] = frozenset()
    processors: Items[PrefixProcessor] = ()
    tokenizer: Any = None
    drafting: Any = None
    nodes: int = 0
    pace: Pace | None = None
    cache: Any = None
    trail: Trail | None = None
    plain_trail: Trail | None = None
    owed: Budget | None = None
    has_run: bool = False
    first: int = 0
    features: list[Float[Tensor, "_ d"]] = field(default_factory=list)
    missed: Missed = field(default_factory=Missed)
    draft_state: Any = None
    records: list[StepRecord] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: UserError | None = None
    cause: Exception | None = None
    last_tree: DraftTree | None = None
    last_path: list[int] = field(default_factory=list)
    told: tuple[int, int, int] = (0, 0, 0)

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt :]

    @property
    def room(self) -> int:
        """Number of tokens that may still be generated."""
        return self.max_len - len(self.token_ids)

    @property
    def num_missing(self) -> int:
        """Number of tokens before the root whose keys and values must still be computed."""
        return len(self.token_ids) - 1 - self.cache.length

    @property
    def scores_prompt(self) -> bool:
        """Whether the logits of its prompt must be computed. The first output of a request computes them, and only once."""
        wanted, found = self.index == 0 and self.sampling.prompt_logprobs is not None, self.prompt_logprobs or ()
        return wanted and len(found) < self.num_prompt

    @property
    def drafts(self) -> bool:
        """Whether it has drafted, or will."""
        return self.drafting is not None and self.nodes > 0

    def budget(self, most: Budget) -> Budget:
        """Returns the largest tree of its next step, within the budget `most`."""
        nodes = min(most.nodes, self.nodes)
        depth = max(0, min(most.depth, nodes, self.room - 1))
        return Budget(nodes if depth else 0, depth)

    def mark(self) -> Mark:
        """Returns where the output stands. It must not have ended."""
        last = self.last_tree, self.last_path
        return Mark(len(self.token_ids), self.text.mark(), self.cumulative_logprob, len(self.records), *last)

    def go_back(self, mark: Mark) -> None:
        """Forgets what a step has committed since `mark` was taken, even if it was interrupted within."""
        num_output = mark.num_tokens - self.num_prompt
        del self.token_ids[mark.num_tokens :], self.kinds[num_output:], self.logprobs[num_output:]
        del self.records[mark.num_records :]
        self.text.go_back(mark.text)
        self.cumulative_logprob = mark.cumulative_logprob
        self.last_tree, self.last_path = mark.last_tree, mark.last_path
        self.finish_reason = self.stop_reason = self.error = self.cause = None

    def fail(self, error: UserError, cause: Exception | None = None) -> None:
        """Ends the output with an error. The tokens so far remain valid."""
        self.finish_reason, self.error, self.cause = "error", error, cause
        with suppress(Exception):  # the text may be what failed
            self.text.flush()

    def completion(self, kind: RequestOutputKind) -> CompletionOutput:
        """Returns the output so far, or what is new in it since `tell`."""
        text = self.text.text if self.finish_reason else self.text.settled
        tokens, characters, records = self.told if kind is RequestOutputKind.DELTA else (0, 0, 0)
        output_ids = self.token_ids[self.num_prompt + tokens :]
        scored = self.sampling.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=text[characters:],
            token_ids=output_ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=self.logprobs[tokens:] if scored else None,
            cumulative_logprob=self.cumulative_logprob if scored else None,
            kinds=self.kinds[tokens:],
            records=self.records[records:],
            last_tree=self.last_tree,
            last_path=list(self.last_path),
            error=self.error,
        )

    def tell(self) -> None:
        """Notes that everything so far was given out."""
        text = self.text.text if self.finish_reason else self.text.settled
        self.told = len(self.token_ids) - self.num_prompt, len(text), len(self.records)


@dataclass(eq=False)
class Request:
    """A prompt that is processed, with its `n` outputs.

    Attributes:
        number: running number within the engine; requests of equal priority are served in this order.
        priority: a smaller number is served first.
        arrived_s: when the request arrived, in seconds of `time.monotonic`, so that nobody who sets the clock changes its wait.
        salt: requests share prefixes only with requests of the same salt.
    """

    request_id: str
    number: int
    prompt: str | None
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int
    priority: int = 0
    arrived_s: float = 0.0
    salt: str | None = None
    num_cached: int = 0
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        """Whether all outputs have ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def order(self) -> tuple[int, int]:
        """Key by which requests are served."""
        return self.priority, self.number

    def tell(self) -> None:
        """Notes that everything so far was given out."""
        for sequence in self.sequences:
            sequence.tell()

    def output(self) -> RequestOutput:
        """Returns the outputs so far, in the form that `SamplingParams.output_kind` names."""
        kind = self.sampling.output_kind
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=self.sequences[0].prompt_logprobs,
            outputs=[sequence.completion(kind) for sequence in self.sequences],
            finished=self.is_finished,
            seed=self.seed,
            num_cached_tokens=self.num_cached,
        )
