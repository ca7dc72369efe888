"""A drafter that is an independent small language model with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.pool import PREFILL_CHUNK, DrafterPools, prefill
from foredraft.core.chains import Chains, ChainWish
from foredraft.core.contracts import Features, Grower, Target, Work
from foredraft.core.errors import UserError
from foredraft.core.setting import Setting
from foredraft.core.tree import Ids, TreeBatch
from foredraft.drafters.growing import Growing, next_pass

MAX_PADDING = 1024
"""Training frameworks pad a vocabulary to a multiple of a power of two, which is at most 1024."""


@dataclass(eq=False)
class LMState(Growing):
    """The drafter's state of one request.

    Attributes:
        path: places to commit before the next step; None if nothing was run.
        num_committed: number of committed tokens of the request.
    """

    path: list[int] | None = None
    num_committed: int = 0


class LMDrafter:
    """Drafts with a language model that has the target's vocabulary. A vocabulary that differs by padding is adjusted.

    Args:
        model: the draft model.
        grower: the tree policy.
        vocab_size: vocabulary size of the target.
    """

    feature_layers: Sequence[int] = ()
    ahead = 0

    def __init__(self, model: Target, grower: Grower, vocab_size: int):
        self.model, self.grower, self.vocab_size = model, grower, vocab_size
        self._pools = DrafterPools(model.new_pool, model.max_len)
        self.bytes_per_token = model.new_pool(0).bytes_per_token

    @classmethod
    def build(cls, setting: Setting) -> LMDrafter:
        """Builds the drafter of a speculative config.

        Raises:
            ValueError: no draft model is given, or its vocabulary differs from the target's.
        """
        if setting.model is None:
            raise UserError("method 'lm' needs a draft model", "give its directory as 'model' (--draft-model)")
        assert setting.grower is not None
        model = setting.load(setting.model)
        check_vocabulary(setting.target.vocab_size, model.vocab_size)
        check_tokens(setting.vocabulary(None), setting.vocabulary(setting.model))
        return cls(model, setting.grower, setting.target.vocab_size)

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> LMState:
        """Returns the state of a new request. Nothing is run before its first tree."""
        return LMState(self._pools.cache(cache, first), list(tokens[first:]), num_committed=len(tokens))

    def written(self, state: LMState) -> int:
        """Returns the number of tokens whose keys and values are in place, also those that are not committed yet."""
        path = state.path or ()
        in_place = next((i for i, node in enumerate(path, start=1) if node != i), len(path) + 1)
        return state.cache.length + (0 if state.path is None else in_place)

    def finish(self, state: LMState) -> None:
        """Releases what the request held."""
        self._pools.finish(state.cache)

    def propose(self, work: Work) -> TreeBatch:
        """Returns one tree per request. It is the root alone if the context of the draft model is full."""
        self._commit(work.states)
        room = [max(0, self.model.max_len - state.num_committed) for state in work.states]
        return self.grower.grow(self, work.capped(room))

    def expand(self, states: Sequence[LMState], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Returns draft logits after the packed nodes `node_ids` of the growing trees, from one pass of the draft model."""
        live, batch, start, rows = next_pass(states, partial, node_ids)
        batch.tokens[batch.tokens >= self.model.vocab_size] = 0  # as in `_known`
        scores = self.model.forward(batch, [states[b].cache for b in live], rows, start=start)
        return fit_vocabulary(scores.logits, self.vocab_size)

    def draw_chains(self, work: Work, wish: ChainWish) -> Chains | None:
        """Draws whole chains if the draft model is compiled and has the target's vocabulary."""
        draw = getattr(self.model, "draw_chains", None)
        if draw is None or self.model.vocab_size != self.vocab_size:
            return None
        for state, root in zip(work.states, work.roots, strict=True):
            state.add(0, root, -1)
        batch = TreeBatch.chains([state.tokens for state in work.states])
        found = draw(batch, [state.cache for state in work.states], wish)
        for state, tokens in zip(work.states, found.tokens, strict=True):
            for node, token in enumerate(tokens[:-1], start=1):
                state.add(node, token, node - 1)
        return found

    def observe(self, state: LMState, tokens: Sequence[int], features: Features | None, path: Sequence[int]) -> None:
        """Finds the committed tokens among the nodes that were run, so that their keys and values are kept.

        Equal tokens on equal paths have equal keys and values. The tokens alone thus determine what to keep, even if a tree
        contains a token twice.
        """
        state.num_committed += len(tokens)
        if not state.tokens or state.path is not None:  # this drafter has not drafted since the last call
            state.pending += tokens
            return
        at = len(state.pending) - 1
        state.path = list(range(1, at + 1))
        children = {(p, t): i for i, (p, t) in reversed(list(enumerate(zip(state.parents, state.tokens, strict=True))))}
        for token in tokens[:-1]:  # the last token is the new root, which is always run again
            if (at, token) not in children:
                break
            at = children[at, token]
            state.path.append(at)
        state.pending = list(tokens[len(state.path) + 1 - len(state.pending) :])

    def _commit(self, states: Sequence[LMState]) -> None:
        """Commits the nodes of the last step, and runs all but the last token of long pending text."""
        run = [state for state in states if state.path is not None]
        if run:
            run[0].cache.pool.keep([state.cache for state in run], [state.path or [] for state in run])
        for state in states:
            state.clear()
            state.path = None
        late = [s for s in states if len(s.pending) > PREFILL_CHUNK and s.num_committed <= self.model.max_len]
        prefill(self.model, [state.cache for state in late], [self._known(state.pending[:-1]) for state in late])
        for state in late:
            state.pending = state.pending[-1:]

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Replaces ids that only the target has, in the padding of its vocabulary, by token 0. At worst, this costs speed."""
        size = self.model.vocab_size
        return [token if token < size else 0 for token in tokens]


def fit_vocabulary(logits: Float[Tensor, "n v"], vocab_size: int) -> Float[Tensor, "n w"]:
    """Returns logits over exactly `vocab_size` tokens. Padding is cut off, and missing tokens are never drafted."""
    missing = vocab_size - logits.shape[-1]
    if missing == 0:
        return logits
    if missing < 0:
        return logits[..., :vocab_size]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)


def check_vocabulary(target_size: int, draft_size: int) -> None:
    """Checks that two vocabulary sizes differ at most by padding.

    Raises:
        ValueError: they differ by more.
    """
    small, large = sorted((target_size, draft_size))
    padded = [-(-small // multiple) * multiple for multiple in (8, 16, 32, 64, 128, 256, 512, 1024) if multiple <= small]
    if large in (small, *padded) or (small > 16 * MAX_PADDING and large - small <= MAX_PADDING):
        return
    raise UserError(
        f"vocabulary mismatch: the draft model has {draft_size} tokens, the target {target_size}: padding cannot explain it",
        "Use a draft model trained with the target's tokenizer, or a method without weights (ngram, suffix)",
    )


def check_tokens(target: dict[str, int] | None, draft: dict[str, int] | None) -> None:
    """Checks that two vocabularies assign the same token to every common id. Unknown vocabularies (None) are not checked.

    Raises:
        ValueError: they differ.
    """
    if target is None or draft is None:
        return
    by_id = {token_id: token for token, token_id in target.items()}
    other = {token_id: token for token, token_id in draft.items()}
    differ = sorted(i for i in by_id.keys() & other.keys() if by_id[i] != other[i])
    if differ:
        first = differ[0]
        raise UserError(
            f"vocabulary mismatch: {len(differ)} token ids stand for other tokens in the draft model, the first is {first}: "
            f"{other[first]!r} there, {by_id[first]!r} in the target",
            "Use a draft model trained with the target's tokenizer",
        )
