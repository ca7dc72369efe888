"""Threads that call one model: each gets what it gets alone, nobody waits for one who is gone, and all blocks come back."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from foredraft import LLM, SamplingParams
from foredraft.core.outputs import RequestOutput
from foredraft.engine.callers import Callers, _Caller
from foredraft.engine.engine import Engine
from test_isolation import Broken, check_empty, raising

DATA = Path(__file__).parent / "data"
TARGET, OTHER = DATA / "babyllama-105", DATA / "babyllama-105-b"
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"method": "ar"},
    "tree": {"method": "lm", "model": str(OTHER), "tree": "dyspec", "num_speculative_tokens": 3},
}
STORY = "Once upon a time, there was a fox"
PROMPTS = [STORY, STORY + " and a hen", "Tom", "Once", "A"]
LIMIT_S = 60
"""Seconds after which a thread counts as stuck."""

pytestmark = pytest.mark.unchecked


@cache
def model(method: str, slots: int = 8) -> LLM:
    return LLM(str(TARGET), CONFIGS[method], dtype="float64", max_num_seqs=slots)


def params(number: int) -> SamplingParams:
    kind = number % 10
    return SamplingParams(temperature=kind % 2, max_tokens=2 + kind % 5, ignore_eos=True, seed=kind, n=1 + (kind == 0))


@cache
def alone(method: str, prompt: str, sampling: SamplingParams) -> list[list[int]]:
    """The tokens of a request that nothing stands beside."""
    return [one.token_ids for one in model(method).generate(prompt, sampling)[0].outputs]


def know(method: str, numbers: range) -> None:
    """Computes what is expected before the threads start."""
    for number in numbers:
        alone(method, PROMPTS[number % 5], params(number))


def check(method: str, number: int, result: RequestOutput) -> None:
    assert result.finished
    assert [one.token_ids for one in result.outputs] == alone(method, PROMPTS[number % 5], params(number))


def together(functions: list[Callable[[], None]]) -> None:
    """Runs each function in a thread of its own. Raises what one of them raised."""
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not [thread for thread in threads if thread.is_alive()], "these threads are stuck"
    for error in errors:
        raise error


def in_time(function: Callable[[], None]) -> None:
    """Runs a function in a thread, so that it cannot be stuck for ever."""
    together([function])


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    for method in CONFIGS:
        for slots in (8, 1):
            check_empty(model(method, slots).engine)
            assert not model(method, slots)._callers._callers


# --- Many threads


@pytest.mark.parametrize("method", CONFIGS)
def test_two_hundred_threads(method: str) -> None:
    """Each generates, streams to the end, or leaves a stream early; some give several prompts."""
    llm = model(method)
    know(method, range(10))
    done: list[int] = []

    def generates(number: int) -> None:
        check(method, number, llm.generate(PROMPTS[number % 5], params(number))[0])

    def generates_several(number: int) -> None:
        numbers = [number + i for i in range(3)]
        results = llm.generate([PROMPTS[i % 5] for i in numbers], [params(i) for i in numbers])
        for i, result in zip(numbers, results, strict=True):
            check(method, i, result)

    def streams(number: int) -> None:
        *_, last = llm.stream(PROMPTS[number % 5], params(number))
        check(method, number, last)

    def leaves_early(number: int) -> None:
        for _ in llm.stream(PROMPTS[number % 5], params(number)):
            break

    def closes_early(number: int) -> None:
        stream: Any = llm.stream(PROMPTS[number % 5], params(number))
        next(stream)
        stream.close()

    def never_begins(number: int) -> None:
        llm.stream(PROMPTS[number % 5], params(number))

    def breaks(number: int) -> None:
        with pytest.raises(Broken):
            for _ in llm.stream(PROMPTS[number % 5], params(number)):
                raise Broken("of the consumer")

    kinds = [generates, streams, generates, leaves_early, generates_several]
    kinds += [closes_early, never_begins, breaks, streams, generates]

    def runs(number: int) -> Callable[[], None]:
        def run() -> None:
            kinds[number % len(kinds)](number)
            done.append(number)

        return run

    together([runs(number) for number in range(200)])
    assert sorted(done) == [*range(200)]


# --- Who is gone does not hold up the others


class Pauses:
    """Runs a function before each call of another one."""

    def __init__(self, function: Callable[..., Any], before: Callable[[int], None]):
        self.function, self.before, self.calls = function, before, 0

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.calls += 1
        self.before(self.calls)
        return self.function(*given, **options)


class Turn:
    """The test takes the turn until some callers wait. Then it does what one does who runs a step, and goes for good."""

    def __init__(self, llm: LLM):
        self.callers = llm._callers

    def __enter__(self) -> Turn:
        self.caller = _Caller()
        assert self.callers._takes_turn(self.caller)
        return self

    def until(self, num_waiting: int) -> None:
        while len(self.callers._idle) < num_waiting:
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.callers._deliver(self.callers.engine.step())
        self.callers._runner = None
        self.callers._wake_one()


@pytest.mark.parametrize("ended", ["suspended", "closed"])
@pytest.mark.parametrize("num_streams", [1, 2, 5])
def test_a_thread_waits_while_streams_are_suspended(ended: str, num_streams: int) -> None:
    """A step gives outputs to the streams alone, whose consumers never come back: who waits must run the next ones."""
    llm = model("plain", 8)
    streams: list[Any] = [llm.stream(PROMPTS[0], replace(params(0), n=1, max_tokens=40)) for _ in range(num_streams)]
    for stream in streams:
        next(stream)
    for caller in llm._callers._callers.values():
        caller.outputs.clear()
        while not caller.inbox.empty():
            caller.inbox.get()

    def takes(stream: Any) -> None:
        next(stream)
        if ended == "closed":
            stream.close()

    def generates() -> None:
        check("plain", 2, llm.generate(PROMPTS[2], params(2))[0])

    def steps() -> None:
        with Turn(llm) as turn:
            threads = [threading.Thread(target=takes, args=(stream,)) for stream in streams]
            for number, thread in enumerate(threads, start=1):
                thread.start()
                turn.until(number)
            others = [threading.Thread(target=generates) for _ in range(2)]
            for other in others:
                other.start()
            turn.until(num_streams + 2)
        for thread in (*threads, *others):
            thread.join()

    in_time(steps)
    for stream in streams:
        stream.close()


def test_a_stream_within_a_stream() -> None:
    """One thread alone: the inner call also runs the steps of the outer one."""
    llm = model("tree", 1)

    def run() -> None:
        stream = llm.stream(PROMPTS[4], params(4))
        next(stream)
        check("tree", 2, llm.generate(PROMPTS[2], params(2))[0])
        *_, last = stream
        check("tree", 4, last)

    in_time(run)


def held_by(llm: LLM, stream: Any) -> int:
    """How many objects wait for the consumer of a suspended stream, in its inbox or as outputs."""
    [caller] = {*llm._callers._callers.values()}
    return len(caller.outputs) + caller.inbox.qsize()


@pytest.mark.parametrize("method", CONFIGS)
def test_a_suspended_stream_holds_the_newest_output(method: str) -> None:
    """However many steps others run for it. Its memory does not grow, and it goes on with everything so far."""
    llm, held = model(method), list[int]()
    sampling = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    wanted = alone(method, PROMPTS[3], sampling)
    stream: Any = llm.stream(PROMPTS[3], sampling)
    first = next(stream)
    for _ in range(12):
        llm.generate(PROMPTS[2], replace(sampling, max_tokens=5))
        held.append(held_by(llm, stream))
    assert max(held) <= 2
    second = next(stream)
    assert len(second.outputs[0].token_ids) > len(first.outputs[0].token_ids) + 40
    found = [first, second, *stream]
    assert [output.finished for output in found] == [False] * (len(found) - 1) + [True]
    assert [one.token_ids for one in found[-1].outputs] == wanted
    assert all(one.outputs[0].token_ids == wanted[0][: len(one.outputs[0].token_ids)] for one in found)


def test_a_stream_that_nobody_refers_to_is_closed_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector of garbage may do so at any time, also in the thread that runs a step, which holds the engine's lock."""
    llm = model("plain")
    forgotten: list[Any] = [llm.stream(PROMPTS[0], replace(params(0), max_tokens=20))]
    next(forgotten[0])

    def before(call: int) -> None:
        if call == 2:
            forgotten.clear()

    monkeypatch.setattr(llm.target, "forward", Pauses(llm.target.forward, before))
    in_time(lambda: check("plain", 4, llm.generate(PROMPTS[4], params(4))[0]))
    assert not forgotten


# --- Interrupts and failures


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_interrupt_in_one_thread(method: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call whose thread runs the step ends. The other threads get their tokens."""
    llm = model(method)
    know(method, range(1, 9))

    def before(number: int) -> None:
        if number == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(llm.target, "forward", Pauses(llm.target.forward, before))
    interrupted: list[int] = []

    def runs(number: int) -> Callable[[], None]:
        def run() -> None:
            try:
                check(method, number, llm.generate(PROMPTS[number % 5], params(number))[0])
            except KeyboardInterrupt:
                interrupted.append(number)

        return run

    together([runs(number) for number in range(1, 9)])
    assert len(interrupted) == 1


class Interrupted:
    """The inbox of a caller that is interrupted when it has been woken."""

    def __init__(self, inbox: Any):
        self.put, self.empty, self._get = inbox.put, inbox.empty, inbox.get

    def get(self) -> Any:
        self._get()
        raise KeyboardInterrupt


def test_an_interrupt_while_a_thread_waits() -> None:
    """It is chosen for the next step, and leaves."""
    llm = model("plain", 8)

    def leaves() -> None:
        stream: Any = llm.stream(PROMPTS[1], params(1))
        with pytest.raises(KeyboardInterrupt):
            next(stream)

    def stays() -> None:
        check("plain", 2, llm.generate(PROMPTS[2], params(2))[0])

    def steps() -> None:
        with Turn(llm) as turn:
            threads = [threading.Thread(target=function) for function in (leaves, stays)]
            threads[0].start()
            turn.until(1)
            [first] = llm._callers._idle
            first.inbox.put(None)  # it waits for its real inbox now, and is interrupted in the next one
            first.inbox = Interrupted(first.inbox)
            threads[1].start()
            turn.until(2)
        for thread in threads:
            thread.join()

    in_time(steps)


def test_a_step_that_fails_raises_in_every_thread_that_took_part(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = model("plain", 1)
    know("plain", range(2, 3))

    def before(call: int) -> None:
        if call == 1:
            raise Broken("no memory")

    monkeypatch.setattr(llm.target, "forward", Pauses(llm.target.forward, before))
    failed: list[int] = []

    def run() -> None:
        try:
            check("plain", 2, llm.generate(PROMPTS[2], params(2))[0])
        except Broken:
            failed.append(1)

    together([run] * 4)
    assert len(failed) == 1  # one runs at once, the others wait


def test_a_request_that_somebody_else_aborts_ends_for_its_caller() -> None:
    llm = LLM(str(TARGET), CONFIGS["plain"], dtype="float64", max_num_seqs=2)
    stream = llm.stream(STORY, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    first = next(stream)
    llm.engine.abort_request(first.request_id)
    [last] = stream
    assert last.finished and last.outputs[0].finish_reason == "abort"
    assert last.outputs[0].token_ids[: len(first.outputs[0].token_ids)] == first.outputs[0].token_ids
    check_empty(llm.engine)


def test_an_interrupt_between_a_step_and_its_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step has reported the ends of other threads' requests. These threads return all the same."""
    llm, deliver, interrupted = model("plain"), Callers._deliver, threading.Event()
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    wanted = alone("plain", STORY, sampling)

    def interrupts(self: Callers, outputs: Any) -> None:
        if any(output.finished for output in outputs) and not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        deliver(self, outputs)

    found = list[Any]()

    def ask() -> None:
        try:
            found.append([one.token_ids for one in llm.generate(STORY, sampling)[0].outputs])
        except KeyboardInterrupt:
            found.append(None)

    monkeypatch.setattr(Callers, "_deliver", interrupts)
    together([ask] * 4)
    assert interrupted.is_set() and len(found) == 4
    assert sum(one is None for one in found) == 1 and all(one in (None, wanted) for one in found)
    check_empty(llm.engine)


def test_one_request_that_fails_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises in Python ends one request. `generate` raises only if nothing was answered."""
    llm, added = model("plain"), Engine.add_requests
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    wanted = [alone("plain", prompt, sampling) for prompt in PROMPTS[:3]]
    broken = set[int]()

    def breaks(self: Engine, pairs: Any, requests: list[Any]) -> None:
        added(self, pairs, requests)
        for place in broken:
            requests[place].sequences[0].processors = [raising]

    monkeypatch.setattr(Engine, "add_requests", breaks)
    broken.add(1)
    found = llm.generate(PROMPTS[:3], sampling)
    assert [one.outputs[0].finish_reason for one in found] == ["length", "error", "length"]
    assert "in the middle" in str(found[1].outputs[0].error)
    assert [found[0].outputs[0].token_ids, found[2].outputs[0].token_ids] == [wanted[0][0], wanted[2][0]]
    broken |= {0, 2}
    with pytest.raises(Broken):
        llm.generate(PROMPTS[:3], sampling)
    check_empty(llm.engine)
