"""The CTC-based drafter at work: slots filled in one forward, what they collapse to as a trie of its own or as a law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.drafters import Setting
from foredraft.drafters.compiled import FEW
from foredraft.drafters.folder import load_head
from foredraft.drafters.pairs import PairState
from foredraft.drafters.prefixes import PrefixLaws, likeliest_prefixes
from foredraft.drafters.slots import LayerSlots, SlotDrafter
from foredraft.draws import Draws
from foredraft.grow.base import draft_sampling
from foredraft.params import SamplingParams
from foredraft.protocols import Budget, Grower
from foredraft.tree import Ids, TreeBatch

DEFAULT_TOKENS = 8


class CtcDrafter(SlotDrafter):
    """Drafts what the slots collapse to, repeats merged and blanks dropped. Every node's position is its depth, so that
    nothing is left of what was dropped.

    Without a grower its tree is the trie of the likeliest prefixes: a function of the slots, which makes it exact with every
    rule for deterministic nodes. These slots are taken at the temperature of other draft laws: the request's, 0.6 where it is
    greedy. A grower is given laws: P(token | path) is the probability of the longer prefix over that of the path, summed over
    all that collapses to it, so that children can be sampled from it and every tree and rule can be used.

    Args:
        slots: fills the slots.
        grower: how its trees grow; None for its own.
        vocab_size: the target's.
        ctc_tokens: likeliest tokens that a slot may take in its own tree; None: 8.

    Source: Wen, Gui, Feng 2024 (arXiv 2412.00061), sections 3.2 and 3.3; the laws are ours.

    Raises:
        ValueError: `ctc_tokens` is below 1, or given beside a grower.
    """

    def __init__(self, slots: LayerSlots, grower: Grower | None, vocab_size: int, *, ctc_tokens: int | None = None):
        if ctc_tokens is not None and grower is not None:
            raise ValueError(f"ctc_tokens={ctc_tokens} is of ctc's own tree, and another tree is named: leave out one of them")
        super().__init__(slots, grower, vocab_size)
        self._num_tokens = ctc_tokens or DEFAULT_TOKENS

    @classmethod
    def build(cls, setting: Setting, *, force: bool = False, weight_bits: int = FEW, **options: int) -> CtcDrafter:
        """The drafter of a speculative config.

        Raises:
            ValueError: there is no head in the directory, it belongs to another target.
        """
        loaded = load_head(setting, force=force)
        slots = LayerSlots(loaded.head, loaded.config, setting.target, setting.num_slots, weight_bits=weight_bits)
        return cls(slots, setting.grower, setting.target.vocab_size, **options)

    @torch.inference_mode()
    def propose(
        self,
        states: Sequence[PairState],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One tree a request; none before the target has run a token, and none where the head's context is full."""
        if self.grower is not None:
            return super().propose(states, budgets, sampling, draws)
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
    def expand(self, states: Sequence[PairState], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Logarithms of the laws after the packed nodes `node_ids`; the first call of a step fills the slots."""
        owners = np.searchsorted(partial.offsets, node_ids, side="right") - 1
        live = np.unique(owners).tolist()
        self._begin([states[b] for b in live if states[b].carried is None])
        parts = []
        for b in live:
            tree, begin = slice(*partial.offsets[b : b + 2]), partial.offsets[b]
            given = partial.tokens[tree].tolist(), partial.parents[tree].tolist(), (node_ids[owners == b] - begin).tolist()
            parts.append(states[b].carried.logits(*given))
        return torch.cat(parts)[torch.from_numpy(np.argsort(np.argsort(owners, kind="stable")))]

    def _held(self, filled: Float[Tensor, "k w"]) -> PrefixLaws:
        return PrefixLaws(filled.cpu().float().softmax(-1))  # walked node by node

    def _frames(self, filled: Float[Tensor, "b k w"], heat: Float[Tensor, " b"]) -> tuple[Any, Any, Any]:
        """Of every slot the likeliest tokens, their probabilities at each request's temperature, and that of the blank, which
        stands last."""
        probs = (filled / heat[:, None, None]).softmax(-1)
        best, tokens = probs[..., :-1].topk(min(self._num_tokens, probs.shape[-1] - 1))
        return tokens.cpu().numpy(), best.double().cpu().numpy(), probs[..., -1].double().cpu().numpy()
