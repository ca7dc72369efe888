"""Chains drawn in one call: token for token and law for law those that are drawn pass by pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from foredraft import LLM, SamplingParams
from foredraft.core.chains import ChainWish
from foredraft.core.law import largest, lawful, limits_of
from foredraft.core.tree import TreeBatch
from foredraft.kernels import library, run
from foredraft.kernels.sets import using
from foredraft.models.native import NativeTarget
from foredraft.trees import at_once as module
from foredraft.trees.base import ByTemperature
from foredraft.trees.options_dynamic import DySpec
from foredraft.trees.options_fixed import Chain
from instruction_sets import NAMES, check_bits, code_of
from test_native import PROMPTS, make_weights, prefilled

ROOTS = [[7, 9], [11]]
"""Committed tokens that have not run yet, for each of `PROMPTS`."""

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.6),
    "sampled": SamplingParams(temperature=1),
    "cut": SamplingParams(temperature=0.7, top_p=0.8, top_k=20, min_p=0.01),
}


def pass_by_pass(target: Any, caches: Any, wish: ChainWish, sampling: SamplingParams) -> tuple[list[list[int]], torch.Tensor]:
    """The chains by `forward`, and the law of every token."""
    drawn: list[list[int]] = [[] for _ in ROOTS]
    laws: list[list[torch.Tensor]] = [[] for _ in ROOTS]
    for step in range(wish.depth):
        batch = TreeBatch.chains([[*root, *tokens] for root, tokens in zip(ROOTS, drawn, strict=True)])
        first = [0 if step == 0 else len(root) + step - 1 for root in ROOTS]
        logits = target.forward(batch, caches, batch.offsets[1:] - 1, start=first).logits
        kept = logits.topk(wish.kept) if wish.kept < logits.shape[1] else None
        for b, probs in enumerate(lawful(logits if kept is None else kept.values, sampling).probs):
            laws[b].append(probs)
            if wish.uniforms is None:
                token = int(largest(probs[None], 1).places)
            else:
                token = run("categorical", probs, uniform=wish.uniforms()[b][step])
            drawn[b].append(token if kept is None else int(kept.indices[b, token]))
    return drawn, torch.stack([law for of_tree in laws for law in of_tree])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_one_call_draws_what_forwards_draw(name: str, kind: str) -> None:
    config, weights = make_weights("one layer")
    rng = np.random.default_rng(0)
    with using(code_of(name)):
        target = NativeTarget(config, weights)
        for depth, kept in ((1, 64), (4, 64), (3, 16)):
            numbers = rng.random((2, depth)).tolist()
            uniforms = None if kind == "greedy" else lambda numbers=numbers: numbers
            wish = ChainWish(depth, kept, limits_of(SAMPLINGS[kind]), uniforms)
            begun = [TreeBatch.chains(ROOTS), prefilled(target, PROMPTS)[1]]
            found = target.draw_chains(*begun, wish)
            tokens, laws = pass_by_pass(target, prefilled(target, PROMPTS)[1], wish, SAMPLINGS[kind])
            assert found.tokens == tokens
            assert all(cache.length == len(prompt) for cache, prompt in zip(begun[1], PROMPTS, strict=True))
            if uniforms is not None:
                check_bits(found.laws, laws)


@pytest.mark.skipif(library() is None, reason="no compiled kernels run here")
def test_logits_without_a_law_draw_from_the_same_replacement() -> None:
    config, weights = make_weights("one layer")
    weights["model.norm.weight"][:] = 1e38  # logits overflow
    target, uniforms = NativeTarget(config, weights), lambda: [[0.3, 0.99], [0.0, 0.5]]
    wish = ChainWish(2, 64, limits_of(SAMPLINGS["sampled"]), uniforms)
    found = target.draw_chains(TreeBatch.chains(ROOTS), prefilled(target, PROMPTS)[1], wish)
    assert found.tokens == pass_by_pass(target, prefilled(target, PROMPTS)[1], wish, SAMPLINGS["sampled"])[0]
    greedy = target.draw_chains(TreeBatch.chains(ROOTS), prefilled(target, PROMPTS)[1], wish._replace(uniforms=None))
    assert all(0 <= token < 64 for tokens in greedy.tokens for token in tokens)


def trees_of(options: dict[str, Any], sampling: list[SamplingParams], monkeypatch: pytest.MonkeyPatch, at_once: bool) -> Any:
    """The trees of a batch of requests, and how many of them were drawn in one call."""
    llm = LLM(speculative_config={"tree": "chain", "num_speculative_tokens": 5} | options, max_num_seqs=len(sampling))
    drafter, seen, count = llm.engine.drafter, [], [0]
    original, propose = module.at_once, drafter.propose

    def counted(*arguments: Any) -> TreeBatch | None:
        found = original(*arguments) if at_once else None
        count[0] += found is not None
        return found

    def remembered(work: Any) -> TreeBatch:
        seen.append(propose(work))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, "at_once", counted)
        patch.setattr(drafter, "propose", remembered)
        outputs = llm.generate(["Write a poem about the sea.", "What is 17 times 3?", "Name three animals."], sampling)
    return [output.outputs[0].token_ids for output in outputs], seen, count[0]


@pytest.mark.skipif(library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    "options",
    [{"method": "fspad"}, {"method": "eagle", "draft_top_k": 20}, {"method": "lm"}, {"method": "fspad-lookup"}],
    ids=lambda options: options["method"],
)
def test_growing_at_once_changes_no_tree(options: dict[str, Any], temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests end at different times, so that some steps have chains of unequal depth, which are drawn pass by pass."""
    sampling = [SamplingParams(temperature=temperature, max_tokens=n, seed=n, ignore_eos=True) for n in (12, 17, 31)]
    tokens, trees, count = trees_of(options, sampling, monkeypatch, at_once=True)
    plain_tokens, plain_trees, none = trees_of(options, sampling, monkeypatch, at_once=False)
    assert count > 0 and none == 0
    assert tokens == plain_tokens
    assert len(trees) == len(plain_trees)
    for batch, plain in zip(trees, plain_trees, strict=True):
        for one, other in zip((batch[b] for b in range(len(batch))), (plain[b] for b in range(len(plain))), strict=True):
            for name in ("tokens", "parents", "drawn"):
                np.testing.assert_equal(getattr(one, name), getattr(other, name), name)
            laws = [(one.law(node), other.law(node)) for node in range(one.num_nodes)]
            assert all((law is None) == (wanted is None) for law, wanted in laws)
            for law, wanted in laws:
                if law is not None and wanted is not None:
                    check_bits(law, wanted)


@pytest.mark.skipif(library() is None, reason="no compiled kernels run here")
def test_chains_beside_another_tree_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where greedy requests have another tree than sampled ones, as the automatic choice may decide."""
    llm = LLM(speculative_config={"method": "fspad", "num_speculative_tokens": 4})
    drafter, wishes = llm.engine.drafter, []
    drafter.grower = ByTemperature(DySpec(), Chain())
    draw = drafter.draw_chains
    monkeypatch.setattr(drafter, "draw_chains", lambda work, wish: wishes.append(wish) or draw(work, wish))
    for temperature, drawn in ((0, False), (1, True)):
        llm.generate(["What is a lake?"], SamplingParams(temperature=temperature, max_tokens=8))
        assert bool(wishes) is drawn
