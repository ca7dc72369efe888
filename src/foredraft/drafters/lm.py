"""An independent small language model as drafter, with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache import PREFILL_CHUNK, prefill
from foredraft.drafters import Setting
from foredraft.drafters.growing import Growing, capped, next_pass
from foredraft.draws import Draws
from foredraft.params import SamplingParams
from foredraft.protocols import Budget, Grower, Target
from foredraft.tree import Ids, TreeBatch

MAX_PADDING = 1024
"""Training frameworks pad a vocabulary to a multiple of a power of two, 1024 at most."""


@dataclass(eq=False)
class LMState(Growing):
    """What the drafter knows of one request.

    Attributes:
        path: places to commit before the next step; None if nothing was run.
        num_committed: tokens of the request.
    """

    path: list[int] | None = None
    num_committed: int = 0


class LMDrafter:
    """Drafts with any `Target` of the same vocabulary; vocabularies that differ by padding are cut or filled up.

    Args:
        model: the draft model.
        grower: how its trees grow.
        vocab_size: the target's.
        num_slots: requests in flight at most.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, model: Target, grower: Grower, vocab_size: int, num_slots: int):
        self.model, self.grower, self.vocab_size = model, grower, vocab_size
        self._pool = model.new_pool(num_slots, model.max_len)

    @classmethod
    def build(cls, setting: Setting) -> LMDrafter:
        """The drafter of a speculative config.

        Raises:
            ValueError: there is no model, or its vocabulary is another one.
        """
        if setting.model is None:
            raise ValueError("method 'lm' needs a draft model: give its directory as 'model' (--draft-model)")
        assert setting.grower is not None
        model = setting.load(setting.model)
        check_vocabulary(setting.target.vocab_size, model.vocab_size)
        check_tokens(setting.vocabulary(None), setting.vocabulary(setting.model))
        return cls(model, setting.grower, setting.target.vocab_size, setting.num_slots)

    def start(self, tokens: Sequence[int], features: Float[Tensor, "m d"] | None) -> LMState:
        """A new request; nothing is run before its first tree."""
        return LMState(self._pool.allocate(), list(tokens), num_committed=len(tokens))

    def finish(self, state: LMState) -> None:
        """Frees the request's slot."""
        self._pool.free(state.cache)

    def propose(
        self,
        states: Sequence[LMState],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One tree a request; none where the draft model's own context is full."""
        self._commit(states)
        roots = [state.pending[-1] for state in states]
        room = [max(0, self.model.max_len - state.num_committed) for state in states]
        return self.grower.grow(self, states, roots, capped(budgets, room), sampling, draws)

    def expand(self, states: Sequence[LMState], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Draft logits after the packed nodes `node_ids` of the growing trees, in one pass of the draft model."""
        live, batch, start, rows = next_pass(states, partial, node_ids)
        batch.tokens[batch.tokens >= self.model.vocab_size] = 0  # as in `_known`
        scores = self.model.forward(batch, [states[b].cache for b in live], rows, start=start)
        return fit_vocabulary(scores.logits, self.vocab_size)

    def observe(
        self, state: LMState, tokens: Sequence[int], features: Float[Tensor, "m d"] | None, path: Sequence[int]
    ) -> None:
        """Follows the committed tokens through what was run. Equal tokens on equal paths have equal keys and values, so the
        tokens alone tell what to keep, also where a tree holds one token twice."""
        state.num_committed += len(tokens)
        if not state.tokens or state.path is not None:  # nothing was drafted by this drafter since it was told last
            state.pending += tokens
            return
        at = len(state.pending) - 1
        state.path = list(range(1, at + 1))
        children = {(p, t): i for i, (p, t) in reversed(list(enumerate(zip(state.parents, state.tokens, strict=True))))}
        for token in tokens[:-1]:  # the last one is the new root, which is always run anew
            if (at, token) not in children:
                break
            at = children[at, token]
            state.path.append(at)
        state.pending = list(tokens[len(state.path) + 1 - len(state.pending) :])

    def _commit(self, states: Sequence[LMState]) -> None:
        """Keeps what the last step left, and runs all but the last part of long pending text."""
        run = [state for state in states if state.path is not None]
        self._pool.keep([state.cache for state in run], [state.path or [] for state in run])
        for state in states:
            state.clear()
            state.path = None
        late = [s for s in states if len(s.pending) > PREFILL_CHUNK and s.num_committed <= self.model.max_len]
        prefill(self.model, self._pool, [state.cache for state in late], [self._known(state.pending[:-1]) for state in late])
        for state in late:
            state.pending = state.pending[-1:]

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Ids that only the target has, in the padding of its vocabulary, read as token 0: that can cost no more than speed."""
        size = self.model.vocab_size
        return [token if token < size else 0 for token in tokens]


def fit_vocabulary(logits: Float[Tensor, "n v"], vocab_size: int) -> Float[Tensor, "n w"]:
    """Logits over exactly `vocab_size` tokens: padding is cut off, missing tokens are never drafted."""
    missing = vocab_size - logits.shape[-1]
    if missing == 0:
        return logits
    if missing < 0:
        return logits[..., :vocab_size]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


def check_vocabulary(target_size: int, draft_size: int) -> None:
    """Checks that two vocabulary sizes differ by padding at most.

    Raises:
        ValueError: they are too far apart.
    """
    small, large = sorted((target_size, draft_size))
    padded = [-(-small // multiple) * multiple for multiple in (8, 16, 32, 64, 128, 256, 512, 1024) if multiple <= small]
    if large in (small, *padded) or (small > 16 * MAX_PADDING and large - small <= MAX_PADDING):
        return
    raise ValueError(
        f"vocabulary mismatch: the draft model has {draft_size} tokens, the target {target_size}, more than padding explains. "
        "Use a draft model trained with the target's tokenizer, or a method without weights (ngram, suffix)"
    )


def check_tokens(target: dict[str, int] | None, draft: dict[str, int] | None) -> None:
    """Checks that two tokenizers, where both are known, give every id that they share to the same token.

    Raises:
        ValueError: they do not.
    """
    if target is None or draft is None:
        return
    by_id = {token_id: token for token, token_id in target.items()}
    other = {token_id: token for token, token_id in draft.items()}
    differ = sorted(i for i in by_id.keys() & other.keys() if by_id[i] != other[i])
    if differ:
        first = differ[0]
        raise ValueError(
            f"vocabulary mismatch: {len(differ)} token ids stand for other tokens in the draft model, the first is {first}: "
            f"{other[first]!r} there, {by_id[first]!r} in the target. Use a draft model trained with the target's tokenizer"
        )
