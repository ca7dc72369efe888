"""An interrupt at every line of a step: for each request, the step counts as a whole or is done again. With tables, in float64.

Three requests of other threads run: one is admitted or has its prompt computed, one decodes, one ends. After the interrupt the
engine goes on. Tokens, texts, kinds and log-probabilities are those of each request alone, and all blocks are free in the end.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import foredraft
from foredraft.core.costs import Costs
from foredraft.core.output_kind import RequestOutputKind
from foredraft.core.outputs import CompletionOutput
from foredraft.core.params import SamplingParams
from foredraft.engine.engine import Engine
from foredraft.engine.request import Request
from test_isolation import STEPS, check_empty, engine_of

ROOT = Path(foredraft.__file__).parent
TRACED = [*sorted((ROOT / "engine").glob("*.py")), *sorted((ROOT / "cache").glob("*.py")), ROOT / "core" / "text.py"]
FILES = {str(file) for file in TRACED if file.name not in ("one_thread.py", "callers.py", "async_engine.py")}
PIECES = [b"a", b"\xc3", b"\xa9", b"b c", b"\xe2\x82", b"\xac"]
"""Some tokens are a part of a character, so that the text of a token comes with a later one."""
PROMPT = [1, 2, 3, 4, 5, 3, 2] * 5
pytestmark = pytest.mark.unchecked


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return b"".join(PIECES[token] for token in ids).decode(errors="replace")

    def encode(self, text: str, **_: Any) -> list[int]:
        return [0 for _ in text]


BASE = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=1)
GIVEN = {
    "ends": (PROMPT[:34], replace(BASE, max_tokens=4, output_kind=RequestOutputKind.DELTA)),
    "decodes": ([1, 2, 3], replace(BASE, temperature=1.0, seed=3, n=2, output_kind=RequestOutputKind.DELTA)),
    "comes": (PROMPT, replace(BASE, stop=["bb", "é"], prompt_logprobs=0)),
}


ALONE_PAYS = Costs(((1.0, 1.0), (39.0, 1.0), (64.0, 200.0)), ((0.0, 0.0, 0.0), (5.0, 0.0, 0.0)), ((5.0, 2.5),))
"""Steps of up to 39 rows cost the same, and others much more. So a drafter pauses beside the trees of several others."""


def new_engine(drafting: str) -> Engine:
    engine = engine_of("tree" if drafting == "paced" else drafting, blocks=24, max_num_batched_tokens=24, max_num_seqs=4)
    engine.tokenizer = Bytes()
    if drafting == "paced":
        engine._drafting._costs = lambda sampling: ALONE_PAYS
    return engine


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line, or the n-th bytecode, of the traced files while it is entered."""

    def __init__(self, number: int, *, opcodes: bool = False):
        self.left, self.opcodes, self.at = number, opcodes, ""
        self.passed: list[str] = []

    def __enter__(self) -> Interrupt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = self.opcodes, not self.opcodes
        return self._at

    def _at(self, frame: FrameType, event: str, _: Any) -> Any:
        if event in ("line", "opcode"):
            code = frame.f_code
            self.passed.append(f"{Path(code.co_filename).name} {code.co_name}:{frame.f_lineno}")
            if len(self.passed) == self.left:
                sys.settrace(None)
                self.at = self.passed[-1]
                raise KeyboardInterrupt
        return self._at


def add(engine: Engine, name: str) -> Request:
    return engine.add_request(name, *GIVEN[name])


class Reader:
    """What the consumers of an engine read: for each request and output, its text and tokens."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.texts, self.ids, self.ends = Counter[tuple[str, int]](), dict[tuple[str, int], list[int]](), Counter[str]()
        self.text: dict[tuple[str, int], str] = {}

    def step(self) -> None:
        for output in self.engine.step():
            self.ends[output.request_id] += output.finished
            for one in output.outputs:
                key, is_delta = (output.request_id, one.index), GIVEN[output.request_id][1].output_kind.name == "DELTA"
                self.ids[key] = (self.ids.get(key, []) if is_delta else []) + one.token_ids
                self.text[key] = (self.text.get(key, "") if is_delta else "") + one.text

    def run(self) -> None:
        for _ in range(STEPS):
            if not self.engine.has_unfinished_requests():
                return
            self.step()
        raise AssertionError("nothing moves")


def whole(request: Request) -> list[CompletionOutput]:
    return [one.completion(RequestOutputKind.CUMULATIVE) for one in request.sequences]


@cache
def alone(drafting: str, name: str) -> list[CompletionOutput]:
    engine = new_engine(drafting)
    request = add(engine, name)
    while not request.is_finished:
        engine.step()
    return whole(request)


def scripted(drafting: str, before: int) -> tuple[Reader, list[Request]]:
    """An engine after some steps, with the three requests. The third comes last, or early where drafters pause."""
    reader = Reader(new_engine(drafting))
    requests = [add(reader.engine, "ends"), add(reader.engine, "decodes")]
    for number in range(before):
        if number == (0 if drafting == "paced" else before - 1):
            requests.append(add(reader.engine, "comes"))
        reader.step()
    requests += [] if len(requests) == 3 else [add(reader.engine, "comes")]
    return reader, requests


def check(drafting: str, number: int, before: int, *, opcodes: bool = False) -> bool:
    """Interrupts a step at one place. Returns whether the step came to this place."""
    reader, requests = scripted(drafting, before)
    interrupt = Interrupt(number, opcodes=opcodes)
    try:
        with interrupt:
            reader.step()
    except KeyboardInterrupt:
        pass
    is_told = all(one.told[0] == len(one.output_ids) for request in requests for one in request.sequences)
    is_read = all(reader.ids.get((request.request_id, 0), []) == request.sequences[0].output_ids for request in requests[:2])
    is_lost = is_told and not is_read and not reader.engine._ready  # with the call, if the interrupt comes when it returns
    assert not is_lost or interrupt.at.startswith(("engine.py _given", "engine.py <listcomp>", "engine.py step"))
    reader.run()
    check_empty(reader.engine)
    for request in requests:
        check_request(drafting, request, interrupt.at)
        name = request.request_id
        assert is_lost or reader.ends[name] == 1, interrupt.at
        for one, wanted in zip(request.sequences, alone(drafting, name), strict=True):
            read = reader.ids.get((name, one.index)), reader.text.get((name, one.index))
            assert is_lost or read == (wanted.token_ids, wanted.text), interrupt.at
    return bool(interrupt.at)


def check_request(drafting: str, request: Request, at: str) -> None:
    """A request that was interrupted has what it has alone."""
    scores = [list(one or ()) for one in request.sequences[0].prompt_logprobs or ()]
    assert scores in ([], [[], *([token] for token in PROMPT[1:])]), at
    for one, wanted in zip(whole(request), alone(drafting, request.request_id), strict=True):
        of_load = {"records": [], "last_tree": None} | ({"kinds": [], "last_path": []} if drafting == "paced" else {})
        assert replace(one, **of_load) == replace(wanted, **of_load), at
        num_tokens = sum(step.num_accepted_tokens + (step.kind != "accepted") for step in one.records)
        assert num_tokens == len(one.token_ids), at


def places(drafting: str, before: int, *, opcodes: bool = False) -> list[str]:
    """Where an interrupt can come in a step."""
    reader, _ = scripted(drafting, before)
    with Interrupt(0, opcodes=opcodes) as counting:
        reader.step()
    return counting.passed


def test_an_interrupt_at_every_line() -> None:
    """The last time that the step comes to the line. Steps with trees are interrupted where others do not come."""
    passed = {
        drafting: {at: number for number, at in enumerate(places(drafting, 4), start=1)} for drafting in ("plain", "tree")
    }
    for at in passed["plain"]:
        assert check("plain", passed["plain"][at], 4)
    for at in passed["tree"].keys() - passed["plain"].keys():
        assert check("tree", passed["tree"][at], 4)


def test_an_interrupt_where_drafters_pause() -> None:
    """Only where steps of trees do not come: a drafter pauses, or is told what it missed."""
    known, tested = set(places("tree", 4)), list[str]()
    for before in range(1, 12):
        passed = {at: number for number, at in enumerate(places("paced", before), start=1) if at not in known}
        for number in passed.values():
            assert check("paced", number, before)
        known |= passed.keys()
        tested += passed
    assert all(any(name in at for at in tested) for name in ("pace.py saw", "request.py add", "drafting.py catch_up")), tested


@pytest.mark.slow
@pytest.mark.parametrize("before", range(6))
@pytest.mark.parametrize("drafting", ["plain", "tree"])
def test_an_interrupt_at_every_line_every_time(drafting: str, before: int) -> None:
    for number in range(1, len(places(drafting, before)) + 1):
        assert check(drafting, number, before)


@pytest.mark.slow
@pytest.mark.parametrize("drafting", ["plain", "tree"])
def test_an_interrupt_at_many_bytecodes(drafting: str) -> None:
    for number in range(1, len(places(drafting, 4, opcodes=True)) + 1, 7):
        assert check(drafting, number, 4, opcodes=True)


@pytest.mark.parametrize("call", ["add", "add several", "abort"])
def test_an_interrupt_while_a_request_comes_or_goes(call: str) -> None:
    """It has come or gone as a whole, at the latest with the next step, and the others keep their tokens."""
    for number in range(1, 1000):
        reader, requests = scripted("plain", 4)
        interrupt, added = Interrupt(number), list[Request]()
        try:
            with interrupt:
                if call == "add several":
                    reader.engine.add_requests([(PROMPT, BASE)] * 3, added)
                elif call == "add":
                    reader.engine.add_request("more", PROMPT, replace(BASE, n=3))
                else:
                    reader.engine.abort_request(["decodes"])
        except KeyboardInterrupt:
            pass
        reader.engine.step()
        reader.engine.abort_request(["more", *(request.request_id for request in added)])
        assert not any(name.isdigit() for name in reader.engine._requests), interrupt.at  # none that nobody knows of
        while reader.engine.has_unfinished_requests():
            reader.engine.step()
        check_empty(reader.engine)
        for request in requests:
            if request.sequences[0].finish_reason != "abort":
                check_request("plain", request, interrupt.at)
        if not interrupt.at:
            return
    raise AssertionError("the call does not end")
