"""What goes wrong with one request: its neighbours keep their tokens, and every block comes back. With tables, in float64."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foredraft import LLM
from foredraft.core.errors import UserError
from foredraft.core.output_kind import RequestOutputKind
from foredraft.core.outputs import RequestOutput
from foredraft.core.params import SamplingParams
from foredraft.drafters.mixed import MixedDrafter
from foredraft.engine import engine as engine_module
from foredraft.engine import order
from foredraft.engine.engine import Engine, QueueFullError
from foredraft.engine.options import EngineOptions
from foredraft.engine.request import Request
from foredraft.models.table import TableTarget
from test_schedules import DRAFTING, LAW, VOCAB, hashed, model_drafter

LONGEST, STEPS = 96, 2000
TARGET = Path(__file__).parent / "data" / "babyllama-105"
RNG = np.random.default_rng(3)
TEXTS = [RNG.integers(1, VOCAB, size=size).tolist() for size in (20, 37, 5)]
BAD_TEXT = [5, 5, 5, 5, *RNG.integers(1, VOCAB, size=30).tolist()]
"""No other text begins like it."""
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.0, seed=5)
NEIGHBOURS = [(TEXTS[0], GREEDY), (TEXTS[1], SAMPLED), (TEXTS[2], replace(SAMPLED, n=2, output_kind=RequestOutputKind.DELTA))]
drafted = pytest.mark.parametrize("drafting", [name for name in DRAFTING if name != "plain"])
everywhere = pytest.mark.parametrize("drafting", DRAFTING)
pytestmark = pytest.mark.unchecked


def law(prefix: tuple[int, ...]) -> Any:
    return hashed(LAW)(prefix)


def engine_of(drafting: str, *, blocks: int = 40, wrap: Callable[[Any], Any] | None = None, **options: Any) -> Engine:
    given = DRAFTING[drafting]()
    if wrap is not None:
        given["drafter"] = wrap(given["drafter"])
    options = {"max_num_seqs": 5} | options
    target = TableTarget(law, VOCAB)
    return Engine(target, max_model_len=LONGEST, options=EngineOptions(**options), num_kv_blocks=blocks, **given)


def num_free(engine: Engine) -> int:
    return engine.scheduler.pool.blocks.num_free


def check_empty(engine: Engine) -> None:
    """Nothing runs, nothing waits, and every block is free."""
    assert not engine.has_unfinished_requests()
    assert engine.scheduler.running == engine.scheduler.waiting == []
    assert num_free(engine) == engine.scheduler.pool.blocks.count


def run(engine: Engine, caught: type[BaseException] | None = None) -> dict[str, RequestOutput]:
    """Steps until all has ended. Returns the last output of every request. Each must be delivered by a step."""
    found: dict[str, RequestOutput] = {}
    for number in count():
        if not engine.has_unfinished_requests():
            break
        assert number < STEPS, "nothing moves"
        try:
            found |= {output.request_id: output for output in engine.step()}
        except BaseException as error:
            if caught is None or not isinstance(error, caught):
                raise
    check_empty(engine)
    return found


def tokens_of(request: Request) -> list[list[int]]:
    return [one.output_ids for one in request.sequences]


@cache
def alone(drafting: str, which: int) -> list[list[int]]:
    """The tokens of a neighbour that nothing stands beside."""
    engine = engine_of(drafting)
    request = engine.add_request(None, *NEIGHBOURS[which])
    run(engine)
    assert all(one.error is None for one in request.sequences)
    return tokens_of(request)


@cache
def plain(sampling: SamplingParams = GREEDY) -> list[list[int]]:
    """The tokens of the bad request where nothing fails and nothing is drafted."""
    engine = engine_of("plain")
    request = engine.add_request(None, BAD_TEXT, sampling)
    run(engine)
    return tokens_of(request)


@dataclass
class Beside:
    """An engine with all neighbours and the request that something is wrong with, which stands between them."""

    engine: Engine
    drafting: str
    bad_params: SamplingParams = GREEDY

    def __post_init__(self) -> None:
        first, *rest = NEIGHBOURS
        self.neighbours = [self.engine.add_request("0", *first)]
        self.bad = self.engine.add_request("bad", BAD_TEXT, self.bad_params)
        self.neighbours += [self.engine.add_request(str(i), *given) for i, given in enumerate(rest, start=1)]

    def run(self, caught: type[BaseException] | None = None) -> RequestOutput:
        """Returns the output of the bad request."""
        found = run(self.engine, caught)
        self.check()
        assert found.keys() == {"0", "1", "2", "bad"}
        assert all(output.finished for output in found.values())
        return found["bad"]

    def check(self) -> None:
        for which, request in enumerate(self.neighbours):
            assert [one.finish_reason for one in request.sequences] == ["length"] * len(request.sequences)
            assert tokens_of(request) == alone(self.drafting, which)


# --- A law, a processor, a rule, a tokenizer


@everywhere
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_token_is_forbidden(drafting: str, temperature: float) -> None:
    banned = replace(GREEDY, temperature=temperature, logit_bias=dict.fromkeys(range(VOCAB), -np.inf))
    [output] = Beside(engine_of(drafting), drafting, banned).run().outputs
    assert (output.finish_reason, output.token_ids) == ("error", [])
    assert "every token is forbidden by logit_bias" in str(output.error)


@everywhere
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_row_of_logits_is_nan(drafting: str, temperature: float) -> None:
    engine = engine_of(drafting)
    length = len(BAD_TEXT) + 4
    engine.target.law = (
        lambda prefix: (  # type: ignore[attr-defined]
            np.full(VOCAB, np.nan) if prefix[:4] == (5, 5, 5, 5) and len(prefix) >= length else law(prefix)
        )
    )
    [output] = Beside(engine, drafting, replace(GREEDY, temperature=temperature)).run().outputs
    assert (output.finish_reason, len(output.token_ids)) == ("error", 4)
    assert "NaN or infinity" in str(output.error)


class Broken(Exception):
    """Nothing of the package raises it."""


def raising(*_: Any, **__: Any) -> Any:
    raise Broken("in the middle")


@everywhere
@pytest.mark.parametrize("first", [0, 1, 5])
def test_a_processor_raises(drafting: str, first: int) -> None:
    """At once, or after some tokens of the output, also at a node that is only drafted."""
    together = Beside(engine_of(drafting), drafting)
    [sequence] = together.bad.sequences
    sequence.processors = [
        lambda committed, path, row: raising() if len(committed) + len(path) - len(BAD_TEXT) >= first else row
    ]
    [output] = together.run().outputs
    assert output.finish_reason == "error" and "Broken: in the middle" in str(output.error)
    assert isinstance(sequence.cause, Broken)
    assert output.token_ids == plain()[0][: len(output.token_ids)]
    assert len(output.token_ids) <= first


@drafted
def test_a_rule_raises_for_one_tree(drafting: str) -> None:
    engine = engine_of(drafting)
    together = Beside(engine, drafting)
    rule, bad = engine.rule, together.bad.sequences[0]

    def picky(tree: Any, target_law: Any, draws: Any) -> Any:
        if target_law._committed_ids is bad.token_ids and len(bad.output_ids) >= 3:
            raise Broken("not this tree")
        return rule(tree, target_law, draws)

    engine.rule = picky
    [output] = together.run().outputs
    assert output.finish_reason == "error" and "not this tree" in str(output.error)
    assert output.token_ids == plain()[0][: len(output.token_ids)]


class Tokens:
    """A tokenizer that writes the ids, and fails after some calls."""

    def __init__(self, num_calls: float = np.inf):
        self.left = num_calls

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        self.left -= 1
        if self.left < 0:
            raise Broken("no such token")
        return "".join(map(str, ids))


@everywhere
@pytest.mark.parametrize("num_calls", [0, 3, 10])
@pytest.mark.parametrize("of", ["text", "logprobs"])
def test_a_token_has_no_text(drafting: str, num_calls: int, of: str) -> None:
    """After the caches have kept the tokens of the step, and again when the text of the failed output is completed."""
    engine = engine_of(drafting)
    engine.tokenizer = Tokens()
    together = Beside(engine, drafting, replace(GREEDY, logprobs=1))
    [sequence] = together.bad.sequences
    broken = Tokens(num_calls)
    if of == "text":
        sequence.text._tokenizer = broken
    else:
        sequence.tokenizer = broken
    [output] = together.run().outputs
    assert output.finish_reason == "error" and "no such token" in str(output.error)
    assert output.token_ids == plain()[0][: len(output.token_ids)]
    assert len(output.kinds) == len(output.logprobs or ()) == len(output.token_ids)


@everywhere
def test_a_prompt_cannot_be_scored(drafting: str) -> None:
    engine = engine_of(drafting, max_num_batched_tokens=16)
    together = Beside(engine, drafting, replace(GREEDY, prompt_logprobs=1))
    together.bad.sequences[0].tokenizer = Tokens(3)
    [output] = together.run().outputs
    assert (output.finish_reason, output.token_ids) == ("error", [])
    assert "no such token" in str(output.error)


# --- A drafter


class Failing:
    """A drafter that raises in one of its calls, for the request whose text is `BAD_TEXT`, from the n-th of these calls on."""

    def __init__(self, inner: Any, call: str, after: int = 0, error: type[BaseException] = Broken):
        self._inner, self._call, self._left, self._error = inner, call, after, error
        self.feature_layers, self.ahead, self.bytes_per_token = inner.feature_layers, inner.ahead, inner.bytes_per_token

    def _check(self, call: str, states: Sequence[tuple[bool, Any]]) -> None:
        if call == self._call and any(is_bad for is_bad, _ in states):
            self._left -= 1
            if self._left < 0:
                raise self._error(call)

    def start(self, tokens: Sequence[int], features: Any, cache: Any = None, first: int = 0) -> Any:
        is_bad = list(tokens[:4]) == BAD_TEXT[:4]
        self._check("start", [(is_bad, None)])
        return is_bad, self._inner.start(tokens, features, cache, first)

    def propose(self, work: Any) -> Any:
        self._check("propose", work.states)
        return self._inner.propose(replace(work, states=[state for _, state in work.states]))

    def observe(self, state: Any, *given: Any) -> None:
        self._check("observe", [state])
        self._inner.observe(state[1], *given)

    def written(self, state: Any) -> int | None:
        self._check("written", [state])
        return self._inner.written(state[1])

    def finish(self, state: Any) -> None:
        self._check("finish", [state])
        self._inner.finish(state[1])


CALLS = ["start", "propose", "observe", "written", "finish"]


@drafted
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", [0, 2])
def test_a_drafter_fails_for_one_request(drafting: str, call: str, after: int, caplog: pytest.LogCaptureFixture) -> None:
    """The request goes on without it, and the log says so."""
    caplog.set_level(logging.WARNING, "foredraft")
    if call in ("start", "finish", "written") and after:
        pytest.skip("called once, or once a block")
    together = Beside(engine_of(drafting, wrap=lambda inner: Failing(inner, call, after)), drafting)
    [output] = together.run().outputs
    assert (output.finish_reason, output.error) == ("length", None)
    assert [output.token_ids] == plain()
    said = [record.getMessage() for record in caplog.records]
    assert said and all("request bad" in line and f"Broken: {call}" in line for line in said)


@drafted
def test_an_option_that_does_not_fit_one_request(drafting: str, caplog: pytest.LogCaptureFixture) -> None:
    """As the tables of a calibrated tree, which may lack those of sampled requests. The others go on drafting."""
    caplog.set_level(logging.WARNING, "foredraft")
    together = Beside(engine_of(drafting, wrap=lambda inner: Failing(inner, "propose", 1, UserError)), drafting)
    [output] = together.run().outputs
    assert (output.finish_reason, output.error, [output.token_ids]) == ("length", None, plain())
    assert any("request bad" in record.getMessage() for record in caplog.records)


@drafted
def test_a_request_whose_drafter_failed_waits_and_resumes(drafting: str) -> None:
    """Its blocks lack the drafter's keys and values: nobody who drafts may find them, itself included."""
    together = Beside(engine_of(drafting, wrap=lambda inner: Failing(inner, "propose", 2)), drafting)
    engine, [sequence] = together.engine, together.bad.sequences
    while sequence.nodes:
        engine.step()
    engine.scheduler.preempt(sequence)
    again = engine.add_request(None, BAD_TEXT, GREEDY)
    run(engine)
    together.check()
    assert tokens_of(together.bad) == plain() == tokens_of(again)


class Solo(Failing):
    """A drafter that fails for several requests at once, and for none of them alone."""

    def propose(self, work: Any) -> Any:
        if len(work) > 1:
            raise Broken("too many")
        return super().propose(work)


def test_a_drafter_fails_for_a_batch_only(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of("tree", wrap=lambda inner: Solo(inner, ""))
    requests = [engine.add_request(None, text, GREEDY) for text in (TEXTS[0], BAD_TEXT)]
    run(engine)
    assert tokens_of(requests[1]) == plain()
    assert ["too many" in record.getMessage() for record in caplog.records] == [True, True]


@drafted
def test_finish_fails_for_an_abort(drafting: str) -> None:
    together = Beside(engine_of(drafting, wrap=lambda inner: Failing(inner, "finish")), drafting)
    while not together.bad.sequences[0].output_ids:
        together.engine.step()
    together.engine.abort_request("bad")
    run(together.engine)
    together.check()


class Counting:
    """A drafter that counts its states, and may fail to start."""

    feature_layers, ahead, bytes_per_token = (), 0, 0

    def __init__(self, *, fails: bool = False):
        self.inner, self.fails, self.states = model_drafter("chain"), fails, 0
        self.propose, self.observe, self.written = self.inner.propose, self.inner.observe, self.inner.written

    def start(self, *given: Any) -> Any:
        if self.fails:
            raise Broken("start")
        self.states += 1
        return self.inner.start(*given)

    def finish(self, state: Any) -> None:
        self.states -= 1
        self.inner.finish(state)


@pytest.mark.parametrize("fails", [False, True])
def test_every_state_of_a_mixed_drafter_is_finished(fails: bool) -> None:
    parts = Counting(), Counting(fails=fails)
    engine = engine_of("mixed", wrap=lambda _: MixedDrafter(*parts))
    for text, sampling in NEIGHBOURS:
        engine.add_request(None, text, sampling)
    engine.add_request("gone", TEXTS[1], SAMPLED)
    engine.step()
    engine.step()
    engine.abort_request("gone")
    run(engine)
    assert [part.states for part in parts] == [0, 0]


class Hungry(Failing):
    """A drafter that runs many nodes behind the tokens of each request."""

    def __init__(self, inner: Any, more: int):
        super().__init__(inner, "")
        self._more = more

    def propose(self, work: Any) -> Any:
        for _, state in work.states:
            state.cache.reserve(state.cache.length + self._more)
        return super().propose(work)


@pytest.mark.parametrize("drafting", ["chain", "tree"])
@pytest.mark.parametrize("blocks", [5, 7, 10])
def test_a_drafter_needs_more_blocks_than_there_are(drafting: str, blocks: int, caplog: pytest.LogCaptureFixture) -> None:
    """Others wait if that helps: alone, each request has enough blocks, so nothing changes."""
    together = Beside(engine_of(drafting, blocks=blocks, wrap=lambda inner: Hungry(inner, 90)), drafting)
    assert [together.run().outputs[0].token_ids] == plain()
    assert not caplog.records


@pytest.mark.parametrize("drafting", ["chain", "tree"])
def test_a_drafter_needs_more_blocks_than_there_can_be(drafting: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(drafting, blocks=5, wrap=lambda inner: Hungry(inner, 400))
    requests = [engine.add_request(None, text, GREEDY) for text in (*TEXTS, BAD_TEXT)]
    run(engine)
    assert tokens_of(requests[-1]) == plain()
    assert all(one.finish_reason == "length" for request in requests for one in request.sequences)
    assert len([one for one in caplog.records if "OutOfBlocksError" in one.getMessage()]) == len(requests)


# --- A step


class Nth:
    """Calls a function, but raises instead in one of the calls."""

    def __init__(self, function: Callable[..., Any], call: int, error: BaseException):
        self.function, self.left, self.error = function, call, error

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*given, **options)


@everywhere
@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_forward_raises(drafting: str, call: int) -> None:
    """All requests of the step end with the reason. Those that wait do not notice."""
    engine = engine_of(drafting, max_num_seqs=2)
    requests = [engine.add_request(None, *given) for given in NEIGHBOURS]
    engine.target.forward = Nth(engine.target.forward, call, Broken("no memory"))  # type: ignore[method-assign]
    found = run(engine)
    assert len(found) == len(requests)
    failed = [one for request in requests for one in request.sequences if one.finish_reason == "error"]
    assert failed and all("Broken: no memory" in str(one.error) and isinstance(one.cause, Broken) for one in failed)
    for which, request in enumerate(requests):
        for one, tokens in zip(request.sequences, alone(drafting, which), strict=True):
            assert one.output_ids == tokens[: len(one.output_ids)]
            assert one in failed or one.output_ids == tokens
    again = engine.add_request(None, *NEIGHBOURS[1])
    run(engine)
    assert tokens_of(again) == alone(drafting, 1)


def test_generate_raises_what_a_step_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(TARGET), {"method": "ar"}, dtype="float64")
    expected = llm.generate("Once", GREEDY)[0].outputs[0].token_ids
    with monkeypatch.context() as patched:
        patched.setattr(llm.target, "forward", Nth(llm.target.forward, 3, Broken("no memory")))
        with pytest.raises(Broken, match="no memory"):
            llm.generate(["Once", "Once upon a time, there was a fox."], GREEDY)
    check_empty(llm.engine)
    assert llm.generate("Once", GREEDY)[0].outputs[0].token_ids == expected


@everywhere
@pytest.mark.parametrize("where", ["forward", "keep", "propose", "start", "observe", "finish", "law"])
def test_an_interrupt_anywhere(drafting: str, where: str) -> None:
    """The call that is interrupted raises. Every request goes on, and what ended in that step is delivered later."""
    if drafting == "plain" and where in ("propose", "start", "observe", "finish"):
        pytest.skip("there is no drafter")
    for call in (1, 3, 5):
        engine = engine_of(drafting, max_num_batched_tokens=24)
        together = Beside(engine, drafting, replace(GREEDY, max_tokens=11))
        places = {
            "forward": (engine.target, "forward"),
            "keep": (engine.scheduler.pool, "keep"),
            "law": (engine.target, "law"),
        }
        owner, name = places.get(where, (engine.drafter, where))
        interrupted = Nth(getattr(owner, name), call, KeyboardInterrupt())
        setattr(owner, name, interrupted)
        together.run(KeyboardInterrupt)
        assert interrupted.left <= 0
        assert [ids[:11] for ids in plain()] == tokens_of(together.bad)


@everywhere
def test_an_interrupt_in_the_step_in_which_an_output_ends(drafting: str) -> None:
    """One output ends, and another one interrupts the same step later."""
    engine = engine_of(drafting)
    early = drafting == "plain"  # its first token comes with the prompt
    first = engine.add_request("first", TEXTS[0], replace(GREEDY, max_tokens=1 + early))
    second = engine.add_request("second", TEXTS[1], GREEDY)
    engine.step()
    push = second.sequences[0].text.push
    second.sequences[0].text.push = Nth(push, 1, KeyboardInterrupt())  # type: ignore[method-assign]
    engine.scheduler.pool.keep = Nth(engine.scheduler.pool.keep, 2, KeyboardInterrupt())
    found = run(engine, KeyboardInterrupt)
    assert found.keys() == {"first", "second"}
    assert tokens_of(first) == [alone(drafting, 0)[0][: 1 + early]]
    assert len(second.sequences[0].output_ids) == GREEDY.max_tokens


def test_an_interrupt_does_not_lose_a_request_that_waited_too_long() -> None:
    engine = engine_of("plain", max_num_seqs=1, max_wait_s=1e9)
    engine.add_request("runs", TEXTS[0], GREEDY)
    engine.step()
    late = engine.add_request("late", TEXTS[1], GREEDY, arrival_time=-2e9)
    engine.target.forward = Nth(engine.target.forward, 1, KeyboardInterrupt())  # type: ignore[method-assign]
    found = run(engine, KeyboardInterrupt)
    assert found.keys() == {"runs", "late"}
    assert late.sequences[0].finish_reason == "error"


# --- Requests that are refused, or wait too long


@everywhere
def test_a_request_that_can_never_fit_is_refused(drafting: str) -> None:
    engine = engine_of(drafting, blocks=2)
    with pytest.raises(UserError, match="keys and values"):
        engine.add_request(None, TEXTS[0], replace(GREEDY, max_tokens=60))
    check_empty(engine)
    fits = engine.add_request(None, *NEIGHBOURS[0])
    run(engine)
    assert tokens_of(fits) == alone(drafting, 0)


def test_a_full_queue_refuses() -> None:
    engine = engine_of("plain", max_num_seqs=1, max_waiting=2)
    requests = [engine.add_request(None, TEXTS[0], GREEDY)]
    engine.step()
    requests += [engine.add_request(None, TEXTS[0], GREEDY) for _ in range(2)]
    with pytest.raises(QueueFullError, match="max_waiting is 2"):
        engine.add_request(None, TEXTS[0], GREEDY)
    with pytest.raises(QueueFullError):
        engine.add_requests([(TEXTS[0], GREEDY)] * 2, [])
    assert engine.get_num_unfinished_requests() == 3
    run(engine)
    assert [tokens_of(request) for request in requests] == [alone("plain", 0)] * 3


def test_requests_are_added_all_or_none() -> None:
    engine = engine_of("plain", max_num_seqs=2, max_waiting=2)
    with pytest.raises(QueueFullError):
        engine.add_requests([(TEXTS[0], GREEDY)] * 5, [])
    check_empty(engine)
    with pytest.raises(UserError, match="empty"):
        engine.add_requests([(TEXTS[0], GREEDY), ([], GREEDY)], [])
    check_empty(engine)


def test_a_request_waits_too_long() -> None:
    engine = engine_of("plain", max_num_seqs=1, max_wait_s=1e9)
    runs = engine.add_request("runs", TEXTS[0], GREEDY, arrival_time=-2e9)
    engine.options = replace(engine.options, max_wait_s=None)
    engine.step()
    engine.options = replace(engine.options, max_wait_s=1e9)
    late = engine.add_request("late", TEXTS[1], replace(SAMPLED, n=2), arrival_time=-2e9)
    waits = engine.add_request("waits", TEXTS[0], GREEDY)
    found = run(engine)
    assert [one.finish_reason for one in found["late"].outputs] == ["error"] * 2
    assert "max_wait_s" in str(found["late"].outputs[0].error) and late.sequences[0].cause is None
    assert tokens_of(runs) == tokens_of(waits) == alone("plain", 0)


class Clock:
    """The time that a user may set, and the one that only goes on."""

    def __init__(self) -> None:
        self.now, self.ran = 1.8e9, 50.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.ran

    def sleep(self, seconds: float) -> None:
        self.now, self.ran = self.now + seconds, self.ran + seconds


@pytest.mark.parametrize("set_by", [0.0, -1e6, 1e6])
@pytest.mark.parametrize("arrived", ["now", "earlier", "later"])
def test_the_wait_of_a_request(arrived: str, set_by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts from `arrival_time`, which is in seconds of `time.time`. Setting the clock meanwhile changes nothing.

    A request cannot arrive after it was added. Its `arrival_time` may say so if the clock was set back in between.
    """
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    engine = engine_of("plain", max_num_seqs=1, max_wait_s=10.0)
    engine.add_request("runs", TEXTS[0], replace(GREEDY, max_tokens=40))
    engine.step()
    at = {"now": None, "earlier": clock.time() - 4, "later": clock.time() + 4}[arrived]
    late = engine.add_request("late", TEXTS[1], GREEDY, arrival_time=at)
    clock.now += set_by
    clock.sleep(5.9 if arrived == "earlier" else 9.9)
    engine.step()
    assert not late.is_finished
    clock.sleep(0.2)
    engine.step()
    assert late.sequences[0].finish_reason == "error"
    run(engine)


def test_the_order_of_requests_is_that_in_which_they_are_added() -> None:
    engine = engine_of("plain", max_num_seqs=1)
    first = engine.add_request(None, TEXTS[0], GREEDY, arrival_time=2e9)
    second = engine.add_request(None, TEXTS[1], GREEDY, arrival_time=1e9)
    while not first.is_finished:
        engine.step()
    assert not second.sequences[0].has_run
    run(engine)


def test_names_of_requests() -> None:
    """A name may be used again when its request has ended, and running numbers avoid the names that are in use."""
    engine = engine_of("plain")
    engine.add_request("1", TEXTS[0], GREEDY)
    with pytest.raises(UserError, match="still running"):
        engine.add_request("1", TEXTS[1], GREEDY)
    named = [engine.add_request(None, TEXTS[0], GREEDY) for _ in range(3)]
    assert len({request.request_id for request in named} | {"1"}) == 4
    run(engine)
    again = engine.add_request("1", TEXTS[0], GREEDY)
    run(engine)
    assert tokens_of(again) == alone("plain", 0)


# --- Aborts


def stage_of(request: Request, engine: Engine) -> str:
    [sequence] = request.sequences
    if sequence.finish_reason:
        return "finished"
    if sequence in engine.scheduler.waiting:
        return "preempted" if sequence.records else "waiting"
    return "half" if sequence.num_missing else "decoding"


@everywhere
@pytest.mark.parametrize("stage", ["waiting", "half", "decoding", "preempted", "finished"])
def test_an_abort_at_every_stage(drafting: str, stage: str) -> None:
    together = Beside(engine_of(drafting, max_num_batched_tokens=16), drafting)
    engine, bad = together.engine, together.bad
    for _ in range(STEPS):
        if stage == "preempted" and stage_of(bad, engine) == "decoding" and bad.sequences[0].output_ids:
            engine.scheduler.preempt(bad.sequences[0])
        if stage_of(bad, engine) == stage:
            break
        engine.step()
    assert stage_of(bad, engine) == stage
    engine.abort_request("bad")
    engine.abort_request(["bad", "never heard of"])
    assert bad.sequences[0].finish_reason == ("length" if stage == "finished" else "abort")
    assert bad.sequences[0].cache is None and bad.sequences[0].draft_state is None
    run(engine)
    together.check()


@everywhere
def test_an_abort_where_some_of_the_outputs_have_ended(drafting: str) -> None:
    """One of three outputs has ended, one runs, one waits."""
    engine = engine_of(drafting, max_num_seqs=2)
    neighbour = engine.add_request("0", *NEIGHBOURS[0])
    several = engine.add_request("several", BAD_TEXT, replace(SAMPLED, n=3))
    while not any(one.finish_reason for one in several.sequences):
        engine.step()
    engine.abort_request("several")
    assert {one.finish_reason for one in several.sequences} == {"length", "abort"}
    run(engine)
    assert tokens_of(neighbour) == alone(drafting, 0)


@everywhere
@pytest.mark.parametrize("name", ["bad", "0", "2"])
def test_an_abort_within_a_step(drafting: str, name: str) -> None:
    """As by the end of an abandoned stream, which the garbage collector may close anywhere. It waits for the step's end."""
    together = Beside(engine_of(drafting), drafting)
    engine, [sequence] = together.engine, together.bad.sequences
    calls = count()

    def aborts(committed: Any, path: Any, row: Any) -> Any:
        if next(calls) == 2:
            engine.abort_request(name)
        return row

    sequence.processors = [aborts]
    found = run(engine)
    assert name not in found or found[name].outputs[0].finish_reason == "abort" or not found[name].finished
    for which, request in enumerate(together.neighbours):
        if request.request_id != name:
            assert tokens_of(request) == alone(drafting, which)
    assert name == "bad" or tokens_of(together.bad) == plain()


def test_an_abort_of_many_requests_looks_at_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 10,000 is found by bisection. A search through those that wait would look at thousands for each."""
    engine, number, looked = engine_of("plain", max_num_seqs=2), 10_000, count()
    requests = [engine.add_request(None, TEXTS[2], GREEDY, priority=i % 7) for i in range(number)]
    engine.step()
    key = order._order
    monkeypatch.setattr(order, "_order", lambda sequence: (key(sequence), next(looked))[0])
    monkeypatch.setattr(type(requests[0].sequences[0]), "__eq__", lambda one, other: next(looked) < 0 or one is other)
    engine.abort_request([request.request_id for request in requests])
    assert next(looked) < 2 * number * number.bit_length()
    assert all(request.is_finished for request in requests)
    check_empty(engine)


# --- Nothing starves


@pytest.mark.parametrize("drafting", ["plain", "tree", "lookup first"])
@pytest.mark.parametrize("shared", [0, 32, 48])
@pytest.mark.parametrize("blocks", [4, 6])
@pytest.mark.parametrize("caching", [True, False])
def test_a_long_request_beside_endless_short_ones(drafting: str, shared: int, blocks: int, caching: bool) -> None:
    """The queue is never empty. Short requests of equal priority come at every step, some with the long one's beginning."""
    engine = engine_of(drafting, blocks=blocks, max_num_seqs=3, max_num_batched_tokens=20, enable_prefix_caching=caching)
    rng = np.random.default_rng(0)
    text = rng.integers(1, VOCAB, size=56).tolist()

    def add_short() -> None:
        own = rng.integers(1, VOCAB, size=int(rng.integers(1, 20))).tolist()
        engine.add_request(None, text[:shared] + own, replace(SAMPLED, max_tokens=int(rng.integers(1, 8))))

    for _ in range(4):
        add_short()
    long = engine.add_request("long", text, replace(GREEDY, max_tokens=30))
    steps = 0
    while not long.is_finished:
        while len(engine.scheduler.waiting) < 4:
            add_short()
        engine.step()
        steps += 1
        assert steps < 120, "the long request starves"
    assert long.sequences[0].finish_reason == "length"
    run(engine)


# --- What the engine keeps


@pytest.mark.parametrize("options", [{"enable_prefix_caching": False}, {}])
def test_blocks_that_nobody_can_share_are_used_again(options: dict[str, Any]) -> None:
    """Without sharing, the memory of a pool grows to what runs at once, not to all of its blocks."""
    engine, given = engine_of("plain", blocks=200, **options), set[int]()
    take = engine.scheduler.pool.blocks.take

    def taken(*count: Any) -> list[int]:
        given.update(blocks := take(*count))
        return blocks

    engine.scheduler.pool.blocks.take = taken
    sampling = GREEDY if options else replace(GREEDY, prompt_logprobs=0)
    for _ in range(40):
        engine.add_request(None, TEXTS[1], sampling)
        run(engine)
    assert len(given) <= 6


def test_requests_that_ended_are_forgotten() -> None:
    """Blocks that are kept for others do not keep the requests."""
    engine = engine_of("tree", enable_prefix_caching=False)
    given = (GREEDY, replace(SAMPLED, n=2), replace(GREEDY, prompt_logprobs=0))
    requests = [weakref.ref(engine.add_request(None, TEXTS[1], sampling)) for sampling in given]
    run(engine)
    gc.collect()
    assert [request() for request in requests] == [None] * 3
