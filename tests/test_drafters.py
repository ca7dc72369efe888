"""Drafters against brute force: what they look up, and that following the text step by step is as good as reading it anew."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exact import MEASURED
from foredraft.core.contracts import Budget, Work
from foredraft.core.draws import Draws
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, Drawn
from foredraft.drafters import DRAFTERS
from foredraft.drafters.lm import LMDrafter, check_tokens, check_vocabulary, fit_vocabulary
from foredraft.drafters.ngram import NgramDrafter
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.models.loading import load_target
from foredraft.trees import GROWERS

DRAFT_MODEL = Path(__file__).parent / "data" / "babyllama-105-b"
GREEDY, SAMPLED = SamplingParams(temperature=0), SamplingParams(temperature=1.0)
Text = list[int]
Shape = tuple[list[int], list[int]]  # tokens and parents


def texts(count: int, seed: int = 0) -> list[Text]:
    """Random strings over 1 to 5 letters, the shortest first."""
    rng = random.Random(seed)
    return [[rng.randrange(1 + i % 5) for _ in range(1 + i // 4)] for i in range(count)]


def propose(drafter: Any, state: Any, root: int, budget: Budget, sampling: SamplingParams = GREEDY) -> DraftTree:
    [tree] = drafter.propose(Work([state], [root], [budget], [sampling], [Draws(0)]))
    return tree


def shape(tree: DraftTree) -> Shape:
    return tree.tokens.tolist(), tree.parents.tolist()


# --- Lookup


def looked_up(text: Text, most: int, least: int, length: int) -> Text:
    """The naive n-gram lookup: what followed the latest earlier occurrence of the longest n-gram that has one."""
    for size in range(most, least - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[len(text) - size :]:
                return text[end : end + length]
    return []


@pytest.mark.parametrize(("most", "least"), [(1, 1), (2, 2), (4, 1), (5, 3)])
def test_ngram_is_the_naive_lookup(most: int, least: int) -> None:
    drafter, found = NgramDrafter(most, least), 0
    for text in texts(120):
        for budget in (Budget(0, 0), Budget(5, 0), Budget(1, 1), Budget(3, 9), Budget(9, 3), Budget(64, 64)):
            expected = looked_up(text, most, least, min(budget))
            tree = propose(drafter, drafter.start(text, None), text[-1], budget)
            assert shape(tree) == ([text[-1], *expected], list(range(-1, len(expected))))
            assert set(tree.drawn.tolist()) == {Drawn.DETERMINISTIC}
            found += bool(expected)
    assert found > 100


def occurrences(text: Text, part: Text) -> int:
    return sum(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def repeated_suffix(text: Text) -> Text:
    """The longest suffix that also stands earlier in the text."""
    return next(text[i:] for i in range(len(text) + 1) if i == len(text) or occurrences(text, text[i:]) > 1)


def suffix_tree(text: Text, budget: Budget, max_depth: int, factor: float, min_prob: float) -> Shape:
    """The naive suffix drafter: counts what followed each context, and takes the likeliest continuation first."""
    context = repeated_suffix(text)
    deepest = min(budget.depth, max_depth, int(factor * len(context)))
    tokens, parents, paths, probs = [text[-1]], [-1], [list[int]()], [1.0]
    while len(tokens) <= budget.nodes:
        offers = []
        for node, path in enumerate(paths):
            counts = {token: occurrences(text, [*context, *path, token]) for token in sorted(set(text))}
            for token, count in counts.items():
                share = probs[node] * count / max(1, sum(counts.values()))
                taken = [*path, token] in paths
                if count and not taken and share >= min_prob and len(path) < deepest:
                    offers.append((-share, len(path) + 1, token, node))
        if not offers:
            break
        share, _, token, node = min(offers)
        tokens.append(token)
        parents.append(node)
        paths.append([*paths[node], token])
        probs.append(-share)
    return tokens, parents


@pytest.mark.parametrize(("max_depth", "factor", "min_prob"), [(24, 1.0, 0.1), (1, 1.0, 0.0), (3, 2.0, 0.3), (64, 4.0, 0.0)])
def test_suffix_is_the_naive_count(max_depth: int, factor: float, min_prob: float) -> None:
    drafter, branched = SuffixDrafter(max_depth, factor, min_prob), 0
    for text in texts(70):
        state = drafter.start(text, None)
        for budget in (Budget(0, 0), Budget(4, 0), Budget(1, 1), Budget(6, 4)):
            tree = propose(drafter, state, text[-1], budget)
            assert shape(tree) == suffix_tree(text, budget, max_depth, factor, min_prob)
            branched += any(len(children) > 1 for children in tree.children)
    assert branched > 5


def test_suffix_with_room_drafts_every_continuation_once() -> None:
    drafter = SuffixDrafter(64, 64.0, 0.0)
    for text in texts(60, seed=1):
        context, depth = repeated_suffix(text), 3
        tree = propose(drafter, drafter.start(text, None), text[-1], Budget(1024, depth))
        found = [tuple(tree.tokens[tree.path_to(node)].tolist()) for node in range(1, tree.num_nodes)]
        ends = [i + len(context) for i in range(len(text)) if context and text[i : i + len(context)] == context]
        expected = {tuple(text[end : end + size]) for end in ends for size in range(1, depth + 1) if end + size <= len(text)}
        assert len(found) == len(set(found))
        assert set(found) == expected


@pytest.mark.parametrize("make", [NgramDrafter, SuffixDrafter])
def test_observing_piece_by_piece_is_reading_the_whole(make: Any) -> None:
    rng, drafter = random.Random(3), make()
    for text in texts(100, seed=2):
        cuts = sorted({1, len(text), *rng.choices(range(1, len(text) + 1), k=4)})
        state = drafter.start(text[: cuts[0]], None)
        for first, last in pairwise(cuts):
            propose(drafter, state, text[first - 1], Budget(8, 8))  # proposing changes nothing
            drafter.observe(state, text[first:last], None, ())
        whole = drafter.start(text, None)
        assert state == whole
        assert shape(propose(drafter, state, text[-1], Budget(8, 8))) == shape(propose(drafter, whole, text[-1], Budget(8, 8)))


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        (NgramDrafter, (4, 0), "prompt_lookup_min must be at least 1"),
        (NgramDrafter, (2, 3), "prompt_lookup_min must be at most prompt_lookup_max, got 3 and 2"),
        (SuffixDrafter, (0,), "suffix_decoding_max_tree_depth must be between 1 and 64, got 0"),
        (SuffixDrafter, (24, 0.0), "suffix_decoding_max_spec_factor must be above 0, got 0.0"),
        (SuffixDrafter, (24, 1.0, 1.5), "must be between 0 and 1, got 1.5"),
    ],
)
def test_options_out_of_range(make: Any, arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(*arguments)


# --- A language model as drafter


@cache
def draft_model() -> Any:
    return load_target(DRAFT_MODEL, dtype="float64")


def lm_drafter(tree: str = "dyspec", vocab_size: int = 105, **options: Any) -> LMDrafter:
    return LMDrafter(draft_model(), GROWERS[tree].grower(**(MEASURED.get(tree, {}) | options)), vocab_size)


def assert_same_tree(one: DraftTree, other: DraftTree) -> None:
    assert shape(one) == shape(other)
    assert one.drawn.tolist() == other.drawn.tolist()
    for node in range(one.num_nodes):
        law, fresh = one.law(node), other.law(node)
        assert (law is None) == (fresh is None)
        if law is not None:
            torch.testing.assert_close(law, fresh, atol=1e-10, rtol=0)


def next_commit(rng: random.Random, tree: DraftTree) -> tuple[list[int], list[int]]:
    """A random path of the tree, and a token after it: any, or one that the tree holds there too."""
    path = tree.path_to(rng.randrange(tree.num_nodes))
    below = [int(tree.tokens[child]) for child in tree.children[path[-1] if path else 0]]
    return path, [*tree.tokens[path].tolist(), rng.choice([*below, rng.randrange(3, 105)])]


EXPANDED = [name for name, row in GROWERS.items() if row.needs == DRAFTERS["lm"].gives]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree", [*EXPANDED, "merged"])
def test_lm_after_some_steps_is_as_if_started_anew(tree: str, sampling: SamplingParams) -> None:
    """Two requests with ragged random acceptance; a third slot reads the same tokens from the start after every step."""
    drafter = lm_drafter("branching", merge=True, expansion=[3, 2]) if tree == "merged" else lm_drafter(tree)
    rng = random.Random(tree)
    tokens = [[5], [rng.randrange(3, 105) for _ in range(19)]]
    states = [drafter.start(one, None) for one in tokens]
    for step in range(7):
        budgets = [rng.choice([Budget(0, 0), Budget(6, 0), Budget(1, 1), Budget(5, 2), Budget(9, 9)]) for _ in tokens]
        draws = [Draws(7).at(len(one)) for one in tokens]
        work = Work(states, [text[-1] for text in tokens], budgets, [sampling] * 2, draws)
        batch = drafter.propose(work)
        for b in range(2):
            fresh = drafter.start(tokens[b], None)
            [expected] = drafter.propose(work.part([b], [fresh]))
            drafter.finish(fresh)
            assert_same_tree(batch[b], expected)
            path, committed = next_commit(rng, batch[b])
            drafter.observe(states[b], committed, None, path)
            tokens[b] += committed
        if step == 3:  # a request leaves, and another takes its slot
            drafter.finish(states[0])
            tokens[0] = [rng.randrange(3, 105) for _ in range(4)]
            states[0] = drafter.start(tokens[0], None)


def test_lm_runs_long_texts_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = [random.Random(0).randrange(3, 105) for _ in range(60)]
    drafter = lm_drafter()
    whole = propose(drafter, drafter.start(text, None), text[-1], Budget(8, 8), SAMPLED)
    for name in ("foredraft.cache.pool.PREFILL_CHUNK", "foredraft.drafters.lm.PREFILL_CHUNK"):
        monkeypatch.setattr(name, 7)
    assert_same_tree(propose(drafter, drafter.start(text, None), text[-1], Budget(8, 8), SAMPLED), whole)


@pytest.mark.parametrize(("length", "deepest"), [(250, 6), (255, 1), (256, 0), (300, 0)])
def test_lm_stops_at_the_end_of_its_own_context(length: int, deepest: int) -> None:
    """The draft model's context is 256: a node at depth d stands at position length - 1 + d."""
    drafter = lm_drafter("chain")
    state = drafter.start([7] * length, None)
    tree = propose(drafter, state, 7, Budget(9, 9), SAMPLED)
    assert tree.depths.max() == deepest
    drafter.observe(state, [*tree.tokens[1:].tolist(), 9, 9], None, list(range(1, tree.num_nodes)))
    assert propose(drafter, state, 9, Budget(9, 9), SAMPLED).num_nodes == max(1, 1 + 256 - (length + deepest + 2))


def test_lm_reads_tokens_that_only_the_target_has() -> None:
    """A target whose vocabulary is padded: ids beyond the draft model's may stand in the text, and are never drafted."""
    drafter = lm_drafter("topk", vocab_size=112, topk=3)
    state = drafter.start([5, 110, 6, 111], None)
    for root in (111, 108, 108):
        tree = propose(drafter, state, root, Budget(8, 3), SAMPLED)
        assert tree.num_nodes == 9
        assert tree.tokens[1:].max() < 105
        drafter.observe(state, [int(tree.tokens[1]), 108], None, [1])
    assert propose(drafter, state, 108, Budget(1, 1)).tokens[0] == 108


# --- Vocabularies


def test_fit_vocabulary() -> None:
    logits = torch.arange(6.0).view(2, 3)
    assert torch.equal(fit_vocabulary(logits, 3), logits)
    assert torch.equal(fit_vocabulary(logits, 2), logits[:, :2])
    assert fit_vocabulary(logits, 5).softmax(-1)[:, 3:].eq(0).all()
    assert np.isneginf(fit_vocabulary(logits, 4)[:, 3].numpy()).all()


@pytest.mark.parametrize(("target", "draft"), [(1, 1), (105, 112), (112, 105), (105, 128), (32000, 32064), (151643, 151936)])
def test_padding_is_accepted(target: int, draft: int) -> None:
    check_vocabulary(target, draft)


@pytest.mark.parametrize(("target", "draft"), [(1, 2), (105, 106), (105, 512), (4096, 105), (32000, 50257)])
def test_other_vocabularies_are_refused(target: int, draft: int) -> None:
    with pytest.raises(ValueError, match=f"the draft model has {draft} tokens, the target {target}"):
        check_vocabulary(target, draft)


def test_tokens_must_agree_where_both_have_them() -> None:
    target = {"a": 0, "b": 1, "c": 2}
    for same in (None, target, {"a": 0}, {**target, "<pad>": 3}):
        check_tokens(target, same)
        check_tokens(same, target)
    with pytest.raises(ValueError, match=r"2 token ids stand for other tokens .* the first is 1: 'c' there, 'b' in the target"):
        check_tokens(target, {"a": 0, "c": 1, "b": 2})
