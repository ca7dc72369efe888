"""The CTC-based drafter: fills slots in one forward, and drafts the sequences to which they collapse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import Grower, Work
from foredraft.core.errors import UserError
from foredraft.core.setting import Setting
from foredraft.core.tree import Ids, TreeBatch
from foredraft.drafters.compiled import QUANTIZED
from foredraft.drafters.pairs import PairState
from foredraft.drafters.prefixes import PrefixLaws
from foredraft.drafters.slots import LayerSlots, SlotDrafter
from foredraft.heads.folder import load_head
from foredraft.kernels import run
from foredraft.trees.base import draft_sampling

DEFAULT_TOKENS = 8


class CtcDrafter(SlotDrafter):
    """Drafts the sequences to which the slots collapse: repeats are merged, and then blanks are removed.

    The position of a node is its depth, so removed repeats and blanks leave no gaps.

    Without a tree policy, the tree is the trie of the most likely prefixes. It is a function of the slots, so every rule for
    deterministic nodes is exact for it. The slots use the temperature of the draft laws, which is that of the request, or 0.6
    for a greedy request.

    With a tree policy, the drafter provides laws. P(token | path) is the probability of the path extended by the token,
    divided by the probability of the path. Each probability is a sum over all slot sequences that collapse to such a prefix.
    Children can be sampled from these laws, so every tree and every rule can be used.

    Args:
        slots: fills the slots.
        grower: the tree policy; None for the drafter's own tree.
        vocab_size: vocabulary size of the target.
        ctc_tokens: number of most likely tokens that a slot may take in the own tree; None is 8.

    Source: Wen, Gui, Feng 2024 (arXiv 2412.00061), sections 3.2 and 3.3; the laws are ours.

    Raises:
        ValueError: `ctc_tokens` is below 1, or is given together with a tree policy.
    """

    def __init__(self, slots: LayerSlots, grower: Grower | None, vocab_size: int, *, ctc_tokens: int | None = None):
        if ctc_tokens is not None and grower is not None:
            raise UserError(
                f"ctc_tokens={ctc_tokens} only affects ctc's own tree, but another tree is named", "Remove one of them"
            )
        super().__init__(slots, grower, vocab_size)
        self._num_tokens = ctc_tokens or DEFAULT_TOKENS

    @classmethod
    def build(cls, setting: Setting, *, force: bool = False, weight_bits: int = QUANTIZED, **options: int) -> CtcDrafter:
        """Builds the drafter of a speculative config.

        Raises:
            ValueError: the directory holds no head, or the head was trained for another target.
        """
        loaded = load_head(setting, force=force)
        slots = LayerSlots(loaded.head, loaded.config, setting.target, weight_bits=weight_bits)
        return cls(slots, setting.grower, setting.target.vocab_size, **options)

    @torch.inference_mode()
    def propose(self, work: Work) -> TreeBatch:
        """Returns one tree per request. It is the root alone before the target has run a token, or if the context is full."""
        if self.grower is not None:
            return super().propose(work)
        self.slots.settle(work.states)
        work = work.capped([self.slots.room(state) for state in work.states])
        trees: list[tuple[list[int], list[int]]] = [([root], [-1]) for root in work.roots]
        live = [b for b, budget in enumerate(work.budgets) if min(budget)]
        if live:
            filled = self.slots.fill([work.states[b] for b in live]).float()
            temperatures = filled.new_tensor([draft_sampling(work.sampling[b], None).temperature for b in live])
            frames = self._frames(filled, temperatures)
            for b, (tokens, probs, blanks) in zip(live, zip(*frames, strict=True), strict=True):
                nodes, depth = work.budgets[b]
                trees[b] = run("prefixes", tokens, probs, blanks, root=work.roots[b], nodes=nodes, depth=depth)
        return TreeBatch.chains([tokens for tokens, _ in trees], [parents for _, parents in trees])

    @torch.inference_mode()
    def expand(self, states: Sequence[PairState], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Returns the logarithms of the laws after the packed nodes `node_ids`. The first call of a step fills the slots."""
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
        return PrefixLaws(filled.cpu().float().softmax(-1))  # on the CPU, since it is read node by node

    def _frames(self, filled: Float[Tensor, "b k w"], temperatures: Float[Tensor, " b"]) -> tuple[Any, Any, Any]:
        """Returns for every slot the most likely tokens, their probabilities, and the probability of the blank.

        Probabilities are taken at the temperature of each request. The blank is the last entry of `filled`.
        """
        probs = (filled / temperatures[:, None, None]).softmax(-1)
        best, tokens = probs[..., :-1].topk(min(self._num_tokens, probs.shape[-1] - 1))
        return tokens.cpu().numpy(), best.double().cpu().numpy(), probs[..., -1].double().cpu().numpy()
