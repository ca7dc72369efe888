"""The CTC-based drafter at work: slots filled in one forward, the likeliest label sequences of them as a trie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.drafters import Setting
from foredraft.drafters.compiled import FEW, check_bits
from foredraft.drafters.folder import load_head
from foredraft.drafters.pairs import PairState
from foredraft.drafters.prefixes import likeliest_prefixes
from foredraft.drafters.slots import LayerSlots
from foredraft.draws import Draws
from foredraft.grow.base import draft_sampling
from foredraft.protocols import Budget
from foredraft.sampling import SamplingParams
from foredraft.tree import TreeBatch

DEFAULT_TOKENS = 8


class CtcDrafter:
    """Drafts the trie of the likeliest sequences, repeats merged and blanks dropped. Every node's position is its depth, so
    that nothing is left of what was dropped; the trie is a function of the slots, which makes it exact with every rule for
    deterministic nodes. Slots are taken at the temperature of other draft laws: the request's, 0.6 where it is greedy.

    Args:
        slots: fills the slots.
        ctc_tokens: likeliest tokens that a slot may take.

    Source: Wen, Gui, Feng 2024 (arXiv 2412.00061), sections 3.2 and 3.3.

    Raises:
        ValueError: `ctc_tokens` is below 1.
    """

    def __init__(self, slots: LayerSlots, *, ctc_tokens: int = DEFAULT_TOKENS):
        if ctc_tokens < 1:
            raise ValueError(f"ctc_tokens must be at least 1, got {ctc_tokens}")
        self.slots, self.feature_layers = slots, slots.feature_layers
        self._num_tokens = ctc_tokens

    @classmethod
    def build(cls, setting: Setting, *, force: bool = False, weight_bits: int = FEW, **options: int) -> CtcDrafter:
        """The drafter of a speculative config.

        Raises:
            ValueError: there is no head in the directory, it belongs to another target, or `weight_bits` are not 7 or 16.
        """
        check_bits(weight_bits)
        loaded = load_head(setting, force=force)
        slots = LayerSlots(loaded.head, loaded.config, setting.target, setting.num_slots, weight_bits=weight_bits)
        return cls(slots, **options)

    @torch.inference_mode()
    def start(self, tokens: Sequence[int], features: Float[Tensor, "m d"] | None) -> PairState:
        """A new request."""
        return self.slots.start(tokens, features)

    def finish(self, state: PairState) -> None:
        """Gives back what the request held."""
        self.slots.finish(state)

    @torch.inference_mode()
    def propose(
        self,
        states: Sequence[PairState],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One trie a request; none before the target has run a token, and none where the head's context is full."""
        self.slots.settle(states)
        trees: list[tuple[list[int], list[int]]] = [([state.root], [-1]) for state in states]
        live = [b for b, state in enumerate(states) if self.slots.room(state) and min(budgets[b])]
        if live:
            filled = self.slots.fill([states[b] for b in live]).float()
            heat = filled.new_tensor([draft_sampling(sampling[b], None).temperature for b in live])
            for b, (tokens, probs, blanks) in zip(live, zip(*self._frames(filled, heat), strict=True), strict=True):
                trees[b] = likeliest_prefixes(
                    tokens,
                    probs,
                    blanks,
                    root=states[b].root,
                    nodes=budgets[b].nodes,
                    depth=min(budgets[b].depth, self.slots.room(states[b])),
                )
        return TreeBatch.chains([tokens for tokens, _ in trees], [parents for _, parents in trees])

    @torch.inference_mode()
    def observe(
        self, state: PairState, tokens: Sequence[int], features: Float[Tensor, "m d"] | None, path: Sequence[int]
    ) -> None:
        """New pairs."""
        self.slots.observe(state, tokens, features)

    def _frames(self, filled: Float[Tensor, "b k w"], heat: Float[Tensor, " b"]) -> tuple[Any, Any, Any]:
        """Of every slot the likeliest tokens, their probabilities at each request's temperature, and that of the blank, which
        stands last."""
        probs = (filled / heat[:, None, None]).softmax(-1)
        best, tokens = probs[..., :-1].topk(min(self._num_tokens, probs.shape[-1] - 1))
        return tokens.cpu().numpy(), best.double().cpu().numpy(), probs[..., -1].double().cpu().numpy()
