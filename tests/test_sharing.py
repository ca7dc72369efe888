"""What requests share: prefixes and blocks, and the order in which they are served."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from foredraft.cache.blocks import BLOCK, Blocks, OutOfBlocksError, num_blocks
from foredraft.cache.prefixes import Prefixes, Trail
from foredraft.core.contracts import Budget
from foredraft.core.errors import UserError, UserTypeError
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from foredraft.engine.request import Request
from foredraft.models.table import TableTarget
from foredraft.rules import RULES
from test_isolation import engine_of, run, tokens_of
from test_schedules import LAW, QUIET, VOCAB, bundled, hashed, model_drafter

RNG = np.random.default_rng(8)
TEXT = RNG.integers(1, VOCAB, size=2 * BLOCK + 6).tolist()
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ways = pytest.mark.parametrize("drafting", ["plain", "lookup", "tree", "mixed"])
pytestmark = pytest.mark.unchecked


def table() -> TableTarget:
    return TableTarget(hashed(LAW), VOCAB)


def finished(engine: Engine, *prompts: Any, sampling: SamplingParams = GREEDY) -> list[Request]:
    """Runs prompts together until all have ended."""
    requests = [engine.add_request(None, prompt, sampling) for prompt in prompts]
    run(engine)
    return requests


def num_cached(engine: Engine, *prompts: Any, sampling: SamplingParams = GREEDY) -> list[int]:
    return [request.output().num_cached_tokens for request in finished(engine, *prompts, sampling=sampling)]


def salted(salt: Any, text: Sequence[int] = TEXT) -> dict[str, Any]:
    return {"prompt_token_ids": list(text), "cache_salt": salt}


# --- Salts


@ways
@pytest.mark.parametrize("together", [False, True])
def test_requests_share_with_the_same_salt_and_with_no_other(drafting: str, together: bool) -> None:
    engine = engine_of(drafting)
    first, again = ([salted(None), salted("a"), salted("b")] for _ in range(2))
    if together:
        found = num_cached(engine, *first, *again)
    else:
        found = [count for prompt in (*first, *again) for count in num_cached(engine, prompt)]
    assert found == [0, 0, 0] + [2 * BLOCK] * 3
    assert num_cached(engine, TEXT) == [2 * BLOCK]  # without a dictionary, there is no salt either
    assert num_cached(engine, salted("c")) == [0]


@pytest.mark.parametrize("salt", [5, b"a", ["a"], True])
def test_a_salt_is_a_text(salt: Any) -> None:
    engine = engine_of("plain")
    with pytest.raises(UserTypeError, match="cache_salt must be a str"):
        engine.add_request(None, salted(salt), GREEDY)
    assert not engine.has_unfinished_requests()


# --- Prefixes


def collided(tokens: Sequence[int]) -> list[int]:
    """Other tokens with the same hashes."""
    other = [token + sys.hash_info.modulus for token in tokens]
    assert [*map(hash, other)] == [*map(hash, tokens)]
    return other


def test_equal_hashes_of_different_tokens_are_not_shared() -> None:
    text, blocks = [*range(2 * BLOCK)], Blocks(9)
    prefixes, mine = Prefixes(blocks), blocks.take(2)
    prefixes.publish(Trail("a"), mine, text, len(text))
    assert prefixes.match(Trail("a"), text, len(text)) == mine
    assert prefixes.match(Trail("a"), collided(text), len(text)) == []
    assert prefixes.match(Trail("a"), text[:BLOCK] + collided(text[BLOCK:]), len(text)) == mine[:1]
    assert prefixes.match(Trail("b"), text, len(text)) == []


def test_an_engine_does_not_share_tokens_of_equal_hashes() -> None:
    target = TableTarget(lambda prefix: LAW((len(prefix) % 7,)), vocab_size=1 << 62)
    engine = Engine(target, max_model_len=96, num_kv_blocks=20)
    assert num_cached(engine, TEXT) == num_cached(engine, collided(TEXT)) == [0]
    assert num_cached(engine, TEXT) == num_cached(engine, collided(TEXT)) == [2 * BLOCK]


def test_a_trail_names_the_next_block_when_it_is_full() -> None:
    text = [*range(2 * BLOCK + 1)]
    assert Trail("a").next_key(text, BLOCK - 1) is None
    assert Trail("a").next_key(text, BLOCK) == ("a", tuple(text[:BLOCK]))
    assert Trail("a", beyond=1).next_key(text[:BLOCK], BLOCK) is None  # the token behind the block is not known
    assert Trail("a", beyond=1).next_key(text, BLOCK) == ("a", tuple(text[: BLOCK + 1]))
    assert Trail("a", count=1).next_key(text, 2 * BLOCK) == ("a", tuple(text[BLOCK : 2 * BLOCK]))


def test_published_blocks_are_found_until_they_are_given_out_again() -> None:
    text, blocks = [*range(3 * BLOCK)], Blocks(6)
    prefixes = Prefixes(blocks)
    first, second = blocks.take(3), blocks.take(3)
    trail = Trail("a")
    prefixes.publish(trail, first, text, 2 * BLOCK + 5)
    assert trail.count == 2
    prefixes.publish(trail, first, text, 3 * BLOCK)
    prefixes.publish(Trail("a"), second, text, 3 * BLOCK)  # what was published first stays
    found = Trail("a")
    assert prefixes.match(found, text, 2 * BLOCK + 5) == first[:2]
    assert prefixes.match(found, text, 3 * BLOCK) == first[2:]
    blocks.release(second)
    blocks.release(first)
    assert blocks.num_free == 6 and prefixes.match(Trail("a"), text, 3 * BLOCK) == first
    assert sorted(blocks.take(3)) == sorted(second)  # blocks without contents are given out first
    for left in (2, 1, 0):
        assert blocks.take(1) == [first[left]]  # then the end of the prefix
        assert prefixes.match(Trail("a"), text, 3 * BLOCK) == first[:left]


@ways
def test_requests_that_score_their_prompts_share_nothing(drafting: str) -> None:
    """They neither find what others have published nor publish anything."""
    engine, scores = engine_of(drafting), replace(GREEDY, prompt_logprobs=1)
    before, plain = finished(engine, TEXT, sampling=scores)[0], finished(engine, TEXT)[0]
    after = finished(engine, TEXT, sampling=scores)[0]
    assert [one.output().num_cached_tokens for one in (before, plain, after)] == [0, 0, 0]
    assert num_cached(engine, TEXT) == [2 * BLOCK]
    assert tokens_of(before) == tokens_of(plain) == tokens_of(after)
    assert after.output().prompt_logprobs == before.output().prompt_logprobs
    assert len(after.output().prompt_logprobs or ()) == len(TEXT)


@ways
def test_a_prompt_is_scored_anew_after_a_preemption(drafting: str) -> None:
    """The outputs of a request share its blocks, but the one that scores the prompt computes it from the beginning."""
    scores = replace(GREEDY, prompt_logprobs=1, n=2)
    wanted = finished(engine_of(drafting), TEXT, sampling=scores)[0].output().prompt_logprobs
    engine = engine_of(drafting, max_num_batched_tokens=BLOCK + 8)
    request = engine.add_request(None, TEXT, scores)
    engine.step()
    engine.scheduler.preempt(request.sequences[0])
    run(engine)
    assert request.output().prompt_logprobs == wanted and len(wanted or ()) == len(TEXT)


# --- A drafter over features: its entry at a position also depends on the next token


def drafted(engine: Engine, prompt: list[int], sampling: SamplingParams) -> tuple[Request, list[DraftTree]]:
    """A request that runs alone, and its tree of every step."""
    request, trees = engine.add_request(None, prompt, sampling), list[DraftTree]()
    [sequence] = request.sequences
    while not request.is_finished:
        before = len(sequence.records)
        engine.step()
        if len(sequence.records) > before and sequence.last_tree is not None:
            trees.append(sequence.last_tree)
    assert trees and sequence.error is None
    return request, trees


def check_equal(found: Sequence[DraftTree], wanted: Sequence[DraftTree]) -> None:
    """The same nodes, drawn from laws with the same bits."""
    assert [tree.tokens.tolist() for tree in found] == [tree.tokens.tolist() for tree in wanted]
    assert [tree.parents.tolist() for tree in found] == [tree.parents.tolist() for tree in wanted]
    for tree, other in zip(found, wanted, strict=True):
        assert torch.equal(tree.draft_probs, other.draft_probs)


@pytest.mark.parametrize(("method", "tree"), [("fspad", "dyspec"), ("ctc", None)])
@pytest.mark.parametrize("prompt_len", [2 * BLOCK + 3, 40], ids=["prompt", "output"])
def test_proposals_behind_shared_blocks_are_those_without_sharing(method: str, tree: str | None, prompt_len: int) -> None:
    """Texts share two full blocks, of a prompt or of an output, and differ in the next token. Then the last block is computed
    again, since the drafter has no entry for the other token."""
    llm = bundled(method, tree)
    sampling = SamplingParams(temperature=1.0, seed=4, max_tokens=40, ignore_eos=True)
    parts = llm.plan.engine_options()  # type: ignore[union-attr]
    sharing, quiet = (
        Engine(llm.target, max_model_len=160, num_kv_blocks=30, options=options, **parts)
        for options in (EngineOptions(), QUIET)
    )
    prompt = np.random.default_rng(2).integers(5, 200, size=prompt_len).tolist()
    [first] = drafted(sharing, prompt, sampling)[0].sequences
    text, cut = first.token_ids, 2 * BLOCK
    one, two = [token for token in range(201, 204) if token != text[cut]][:2]
    cases = [(text[: cut + 1], BLOCK), (text[: cut + 2], cut), (text[: cut + 9], cut)]
    cases += [([*text[:cut], one], BLOCK), ([*text[:cut], two, 9, 9], BLOCK), ([*text[:cut], two, 7], cut)]
    for given, cached in cases:
        request, trees = drafted(sharing, given, sampling)
        alone, wanted = drafted(quiet, given, sampling)
        check_equal(trees, wanted)
        assert tokens_of(request) == tokens_of(alone)
        assert request.output().num_cached_tokens == cached


def test_blocks_that_a_request_wrote_itself_were_not_cached_for_it() -> None:
    """A request that is preempted, or that has several outputs, finds its own blocks. They do not count as cached."""
    engine = engine_of("plain", max_num_batched_tokens=BLOCK)
    request = engine.add_request(None, TEXT, GREEDY)
    engine.step()
    engine.step()
    engine.scheduler.preempt(engine.scheduler.running[-1])
    run(engine)
    assert request.sequences[0].first == 2 * BLOCK and request.output().num_cached_tokens == 0
    several = replace(GREEDY, n=2)
    assert num_cached(engine, TEXT[::-1], sampling=several) == [0]
    assert num_cached(engine, TEXT[::-1], sampling=several) == [2 * BLOCK]


# --- Memory

BLOCK_BYTES = BLOCK * 2 * 8
"""Of a table: one key and one value of 8 bytes for each token."""


def limited(num_bytes: int, drafting: dict[str, Any] | None = None) -> Engine:
    options = EngineOptions(max_num_seqs=4, kv_cache_memory_bytes=num_bytes)
    return Engine(table(), max_model_len=96, options=options, **(drafting or {}))


def lm(nodes: int, depth: int = 3) -> dict[str, Any]:
    return {"drafter": model_drafter("dyspec"), "rule": RULES["multiround"].rule, "budget": Budget(nodes, depth)}


@pytest.mark.parametrize(("drafting", "of_block"), [({}, BLOCK_BYTES), (lm(5), 2 * BLOCK_BYTES)])
def test_blocks_follow_from_the_memory(drafting: dict[str, Any], of_block: int) -> None:
    """The keys and values of the drafter count too. No step holds more blocks, though four requests would need twelve."""
    engine = limited(8 * of_block - 1, drafting)
    blocks = engine.scheduler.pool.blocks
    assert (blocks.count, engine.memory.num_blocks, engine.memory.num_bytes) == (7, 7, 7 * of_block)
    assert limited(8 * of_block, drafting).scheduler.pool.blocks.count == 8
    assert str(engine.memory).endswith("0 MiB: 224 tokens, or 2.3 times the longest request of 96 tokens")
    with pytest.raises(OutOfBlocksError):
        blocks.take(8)
    requests = [engine.add_request(None, TEXT[: 9 + 9 * i], replace(GREEDY, max_tokens=60)) for i in range(4)]
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        held = {block for one in engine.scheduler.running for block in one.cache.blocks}
        assert held <= {*range(1, 8)} and len(held) == 7 - blocks.num_free
        most = max(most, len(held))
    assert most == 7
    assert [len(tokens) for request in requests for tokens in tokens_of(request)] == [60] * 4


@pytest.mark.parametrize(("drafting", "least"), [({}, 1), (lm(5), 1), (lm(40), 2)])
def test_too_little_memory_is_refused_with_what_suffices(drafting: dict[str, Any], least: int) -> None:
    with pytest.raises(UserError, match="kv_cache_memory_bytes 100 holds 0 blocks") as caught:
        limited(100, drafting)
    enough = int(re.findall(r"\d+", caught.value.hint or "")[0])
    assert enough == least * BLOCK_BYTES * (2 if drafting else 1)
    engine = limited(enough, drafting)
    assert num_cached(engine, TEXT[:3], sampling=replace(GREEDY, max_tokens=1)) == [0]
    with pytest.raises(UserError):
        limited(enough - 1, drafting)


# --- The order of requests


def test_priority_then_arrival_decides_who_is_served() -> None:
    engine = engine_of("plain", max_num_seqs=1)
    priorities = [1, 0, 2, 1, 0]
    requests = [engine.add_request(None, TEXT[i : i + 9], GREEDY, priority=p) for i, p in enumerate(priorities)]
    ends = list[str]()
    while engine.has_unfinished_requests():
        ends += [output.request_id for output in engine.step() if output.finished]
    assert ends == [requests[i].request_id for i in (1, 4, 0, 3, 2)]


@ways
def test_the_youngest_of_the_lowest_priority_is_preempted(drafting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four requests fill a block each, and the pool has seven. The last to arrive is not the last to be served."""
    engine, sampling = engine_of(drafting, blocks=7), replace(GREEDY, max_tokens=70)
    assert num_blocks(5 + 70) * 2 <= 7
    order, preempted = [2, 0, 0, 1, 2], list[str]()
    names = [f"{i} of priority {priority}" for i, priority in enumerate(order)][:4]
    preempt = engine.scheduler.preempt

    def noted(one: Any) -> None:
        preempted.append(one.request.request_id)
        preempt(one)

    monkeypatch.setattr(engine.scheduler, "preempt", noted)
    requests = [engine.add_request(name, [1 + i] * 5, sampling, priority=order[i]) for i, name in enumerate(names)]
    late = engine.add_request("late", [5] * 5, sampling, priority=2)
    for _ in range(3):
        engine.step()
    assert len(engine.scheduler.running) == 5
    run(engine)
    assert preempted[:3] == ["late", names[0], names[3]]
    assert not {names[1], names[2]} & {*preempted}
    for i, request in enumerate([*requests, late]):
        assert tokens_of(request) == tokens_of(finished(engine_of(drafting), [1 + i] * 5, sampling=sampling)[0])
