"""Requests from event loops: their outputs are those of `LLM.generate`, whoever reads slowly, leaves, or fails beside them.

Most tests run a target with a given law, which is fast and can generate endlessly.
"""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import foredraft
from foredraft import LLM, AsyncLLM, CompletionOutput, QueueFullError, RequestOutput, RequestOutputKind, SamplingParams
from foredraft.core.contracts import Budget
from foredraft.core.errors import UserError, UserTypeError
from foredraft.drafters.lm import LMDrafter
from foredraft.engine import async_engine as async_module
from foredraft.engine import engine as engine_module
from foredraft.engine.async_engine import AsyncEngine
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from foredraft.models.table import TableTarget, random_law
from foredraft.rules import RULES
from foredraft.trees import GROWERS
from test_isolation import Clock

DATA = Path(__file__).parent / "data"
STORY = "Once upon a time"
TREE = {"method": "lm", "model": str(DATA / "babyllama-105-b"), "tree": "dyspec", "num_speculative_tokens": 6}
CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
LIMIT_S = 120
"""Seconds after which a test counts as hanging. It takes one or two."""

VOCAB, CONTEXT = 6, 1 << 14
LAW, DRAFT = random_law(VOCAB, 1, concentration=0.3), random_law(VOCAB, 2, concentration=0.3)
SAMPLED = SamplingParams(seed=5, max_tokens=30)
ENDLESS = SamplingParams(seed=7)
"""Ends at the context, after many thousands of steps."""


def run(test: Coroutine[Any, Any, Any]) -> Any:
    """Runs a test in an event loop of its own."""
    return asyncio.run(asyncio.wait_for(test, LIMIT_S))


async def read(outputs: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    return [output async for output in outputs]


# --- The outputs of a model


@cache
def model(method: str) -> LLM:
    return LLM(str(DATA / "babyllama-105"), TREE if method == "tree" else {"method": "ar"}, dtype="float64", max_num_seqs=3)


MODEL_PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=5, max_tokens=20, logprobs=2),
    SamplingParams(seed=6, max_tokens=20, n=2, stop=["th", "e "], ignore_eos=True),
    SamplingParams(seed=7, temperature=0.7, top_p=0.9, max_tokens=1),
    SamplingParams(seed=8, max_tokens=25, prompt_logprobs=0),
]
PROMPTS = [STORY, "Tom and", STORY + ", there was", [7], STORY]


def chained(parts: list[CompletionOutput], name: str) -> list[Any]:
    return [value for part in parts for value in getattr(part, name) or []]


def check_kind(kind: RequestOutputKind, found: list[RequestOutput], wanted: RequestOutput) -> None:
    """Compares the outputs of one request with its only output in `LLM.generate`."""
    assert [output.finished for output in found] == [False] * (len(found) - 1) + [True]
    assert len(found) == 1 or kind is not FINAL_ONLY
    for index, whole in enumerate(wanted.outputs):
        parts = [output.outputs[index] for output in found]
        last, deltas = parts[-1], parts if kind is DELTA else parts[-1:]
        assert "".join(part.text for part in deltas) == whole.text
        for name in ("token_ids", "kinds"):
            assert chained(deltas, name) == getattr(whole, name)
        assert sum(len(part.records) for part in deltas) == len(whole.records)
        assert (last.finish_reason, last.stop_reason) == (whole.finish_reason, whole.stop_reason)
        assert last.cumulative_logprob == pytest.approx(whole.cumulative_logprob)
        assert (whole.logprobs is None) == (last.logprobs is None)
        check_logprobs(chained(deltas, "logprobs"), whole.logprobs or [])
        if kind is CUMULATIVE:
            texts = [part.text for part in parts]
            assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))
    assert (found[-1].prompt, found[-1].prompt_token_ids) == (wanted.prompt, wanted.prompt_token_ids)
    check_logprobs((found[-1].prompt_logprobs or [])[1:], (wanted.prompt_logprobs or [])[1:])


def check_logprobs(found: list[Any], wanted: list[Any]) -> None:
    """A batch of another size may round differently."""
    assert [one.keys() for one in found] == [one.keys() for one in wanted]
    values = [[entry.logprob for one in each for entry in one.values()] for each in (found, wanted)]
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("kind", RequestOutputKind)
@pytest.mark.parametrize("method", ["plain", "tree"])
def test_outputs_are_those_of_generate(method: str, kind: RequestOutputKind) -> None:
    wanted = model(method).generate(PROMPTS, MODEL_PARAMS)

    async def test() -> None:
        async with AsyncLLM.of(model(method)) as llm:
            pairs = zip(PROMPTS, MODEL_PARAMS, strict=True)
            found = await asyncio.gather(*(read(llm.generate(prompt, params.giving(kind))) for prompt, params in pairs))
            for outputs, whole in zip(found, wanted, strict=True):
                check_kind(kind, outputs, whole)
            check_free(llm.engine)

    run(test())


def test_an_engine_of_its_own() -> None:
    """It shares neither requests nor blocks with that of the `LLM`. Without parameters, those of the model apply."""
    llm = model("plain")

    async def test(name: str) -> list[RequestOutput]:
        async with AsyncLLM.of(llm) as other:
            assert other.engine.engine.scheduler.pool is not llm.engine.scheduler.pool
            return await read(other.generate(STORY, request_id=name))

    stream = llm.stream(STORY)
    next(stream)
    outputs = run(test("first"))
    assert outputs[-1].request_id == "first"
    assert run(test("second"))[-1].seed == outputs[-1].seed  # of the first request of an engine
    [wanted] = llm.generate(STORY, replace(llm.get_default_sampling_params(), seed=outputs[-1].seed))
    check_kind(CUMULATIVE, outputs, wanted)
    assert list(stream)[-1].finished


def test_arguments_are_those_of_the_llm() -> None:
    with pytest.raises(TypeError, match="max_model_lenn"):
        AsyncLLM(str(DATA / "babyllama-105"), {"method": "ar"}, max_model_lenn=3)
    conversation = [{"role": "user", "content": "Name three rivers."}]
    params = SamplingParams(temperature=0, max_tokens=6, output_kind=FINAL_ONLY)
    config = {"method": "suffix", "num_speculative_tokens": 4}
    [wanted] = LLM(None, config).chat(conversation, params)

    async def test() -> None:
        async with AsyncLLM(None, config, max_num_seqs=2, max_waiting=5) as llm:
            assert (llm.engine.engine.options.num_seqs, llm.engine.engine.options.max_waiting) == (2, 5)
            [found] = await read(llm.chat(conversation, params, "name", priority=1))
            assert (found.prompt, found.outputs[0].text) == (wanted.prompt, wanted.outputs[0].text)
            with pytest.raises(TypeError, match=r"AsyncLLM\.generate takes no argument 'prioritty'"):
                llm.generate(STORY, prioritty=3)  # type: ignore[call-arg]

    run(test())


def test_public_names() -> None:
    assert {"AsyncLLM", "RequestOutputKind", "QueueFullError"} <= {*foredraft.__all__}
    assert foredraft.QueueFullError is QueueFullError


# --- Requests of a table


def hashed(law: Any) -> Callable[[tuple[int, ...]], Any]:
    """A law of the whole prefix with few different rows, so that long prefixes are cheap."""
    return lambda prefix: law((hash(prefix[-40:]) % 997, prefix[-1]))


def table_engine(**options: Any) -> Engine:
    """An engine that drafts trees."""
    drafter = LMDrafter(TableTarget(hashed(DRAFT), VOCAB), GROWERS["dyspec"].grower(), VOCAB)
    return Engine(
        TableTarget(hashed(LAW), VOCAB),
        drafter=drafter,
        rule=RULES["multiround"].rule,
        budget=Budget(4, 3),
        max_model_len=CONTEXT,
        options=EngineOptions(**{"max_num_seqs": 3, **options}),
        num_kv_blocks=CONTEXT // 4,
    )


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(table_engine())
    yield engine
    engine.shutdown()
    check_free(engine)


def check_free(engine: AsyncEngine) -> None:
    """Nothing runs or waits, and all blocks are free."""
    blocks = engine.engine.scheduler.pool.blocks
    assert not engine.engine.has_unfinished_requests()
    assert not engine.engine.scheduler.waiting and not engine.engine.scheduler.running
    assert blocks.num_free == blocks.count


async def settled(engine: AsyncEngine) -> None:
    """Waits until the engine has done what was asked before."""
    await engine.abort("no such request")


@cache
def alone(prompt: tuple[int, ...], params: SamplingParams) -> list[int]:
    """The tokens of a request that runs alone."""
    engine = table_engine()
    request = engine.add_request(None, prompt, params)
    while not request.is_finished:
        engine.step()
    return request.sequences[0].output_ids


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return outputs[-1].outputs[0].token_ids


async def left_by_cancelling(engine: AsyncEngine) -> None:
    reader = asyncio.create_task(read(engine.generate([1, 2], ENDLESS)))
    await read(engine.generate([3], SAMPLED))  # meanwhile the reader reads
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def left_before_its_first_step(engine: AsyncEngine) -> None:
    first = asyncio.create_task(anext(engine.generate([1, 2], ENDLESS)))
    await asyncio.sleep(0)  # the task starts
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def left_by_closing(engine: AsyncEngine) -> None:
    async with aclosing(engine.generate([1, 2], ENDLESS)) as outputs:
        async for output in outputs:
            if len(output.outputs[0].token_ids) > 5:
                break


async def left_by_breaking(engine: AsyncEngine) -> None:
    """Python closes a generator to which nothing refers, in a task of its own."""
    before = asyncio.all_tasks()
    async for output in engine.generate([1, 2], ENDLESS):
        if len(output.outputs[0].token_ids) > 5:
            break
    await asyncio.sleep(0)  # the task starts
    await asyncio.gather(*asyncio.all_tasks() - before)


async def left_by_an_exception(engine: AsyncEngine) -> None:
    async with aclosing(engine.generate([1, 2], ENDLESS)) as outputs:
        with pytest.raises(ZeroDivisionError):
            async for _ in outputs:
                raise ZeroDivisionError


WAYS = [left_by_cancelling, left_before_its_first_step, left_by_closing, left_by_breaking, left_by_an_exception]


@pytest.mark.parametrize("leave", WAYS)
def test_a_consumer_leaves(leave: Any, engine: AsyncEngine) -> None:
    """Its request ends at once, and its neighbours have the tokens that they have alone."""

    async def test() -> None:
        prompts = [[1, 2, 3], [4] * 40]
        neighbours = [asyncio.create_task(read(engine.generate(prompt, SAMPLED))) for prompt in prompts]
        await leave(engine)
        for prompt, neighbour in zip(prompts, neighbours, strict=True):
            assert tokens_of(await neighbour) == alone(tuple(prompt), SAMPLED)
        await leave(engine)
        await settled(engine)
        check_free(engine)

    run(test())


def test_a_generator_that_nobody_reads_asks_for_nothing(engine: AsyncEngine) -> None:
    async def test() -> None:
        outputs = engine.generate([1], ENDLESS)
        await settled(engine)
        check_free(engine)
        await outputs.aclose()

    run(test())


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_a_slow_consumer(kind: RequestOutputKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """It delays nobody. Whatever it missed is one output, and it misses nothing.

    Both requests gain one token per step. After its first output, the engine waits until the consumer has taken it.
    """
    target = TableTarget(hashed(LAW), VOCAB)
    plain = partial(Engine, target, max_model_len=CONTEXT, num_kv_blocks=2048)
    params = SamplingParams(seed=5, max_tokens=30, n=2, logprobs=1)
    reference, missing = plain(), list[RequestOutput]()
    request = reference.add_request(None, [1, 2], params)
    while not request.is_finished:
        missing += reference.step()
    wanted, taken, others = missing[-1], threading.Event(), plain()
    step, given = others.step, threading.Event()

    def waiting_step() -> list[RequestOutput]:
        assert not given.is_set() or taken.wait(LIMIT_S)
        outputs = step()
        if outputs:
            given.set()
        return outputs

    async def test() -> None:
        engine = AsyncEngine(others)
        slow, found = engine.generate([1, 2], params.giving(kind)), list[RequestOutput]()
        first = asyncio.create_task(anext(slow))
        await asyncio.sleep(0)  # the task starts
        found += [] if kind is FINAL_ONLY else [await first]
        taken.set()
        await read(engine.generate([3], replace(params, n=1, max_tokens=100)))
        found += [await first] if kind is FINAL_ONLY else []
        found += await read(slow)
        assert len(found) == (1 if kind is FINAL_ONLY else 2)
        check_kind(kind, found, wanted)
        engine.shutdown()

    monkeypatch.setattr(others, "step", waiting_step)
    run(test())


def test_mistakes_are_raised_where_they_are_made(engine: AsyncEngine) -> None:
    async def test() -> None:
        for prompt, params, words in (
            ([], SAMPLED, "the prompt is empty"),
            ("text", SAMPLED, "no tokenizer"),
            ([1] * CONTEXT, SAMPLED, "context"),
            ([VOCAB], SAMPLED, "outside the vocabulary"),
            ([1], replace(SAMPLED, stop="x"), "need a tokenizer"),
        ):
            with pytest.raises(UserError, match=words):
                engine.generate(prompt, params)
        with pytest.raises(UserTypeError, match="request_id must be of type str"):
            engine.generate([1], SAMPLED, 3)  # type: ignore[arg-type]
        with pytest.raises(UserTypeError, match="priority must be of type int"):
            engine.generate([1], SAMPLED, priority="high")  # type: ignore[arg-type]
        with pytest.raises(UserTypeError, match="request_id must be of type str"):
            await engine.abort(3)  # type: ignore[arg-type]
        async with aclosing(engine.generate([1], ENDLESS, "same")) as first:
            await anext(first)
            with pytest.raises(UserError, match="'same' is still running"):
                await anext(engine.generate([1], SAMPLED, "same"))
        assert tokens_of(await read(engine.generate([1], SAMPLED, "same"))) == alone((1,), SAMPLED)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the types of arguments are checked by us
        run(test())


def test_a_full_queue() -> None:
    async def test() -> None:
        engine = AsyncEngine(table_engine(max_num_seqs=1, max_waiting=1))
        running, waiting = engine.generate([1], ENDLESS), engine.generate([1], SAMPLED)
        await anext(running)
        first = asyncio.create_task(anext(waiting))
        await asyncio.sleep(0)  # the task starts
        with pytest.raises(QueueFullError, match="max_waiting is 1"):
            await anext(engine.generate([2], SAMPLED))
        await running.aclose()
        assert tokens_of([await first, *await read(waiting)]) == alone((1,), SAMPLED)
        await settled(engine)
        check_free(engine)
        engine.shutdown()

    run(test())


def test_the_wait_before_the_thread_takes_a_request_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting the clock meanwhile changes nothing. Both requests are posted while a step runs."""
    others, clock = table_engine(max_num_seqs=1, max_wait_s=1000.0), Clock()
    entered, go_on, step = threading.Event(), threading.Event(), others.step

    def long_step() -> list[RequestOutput]:
        entered.set()
        assert go_on.wait(LIMIT_S)
        return step()

    async def test() -> None:
        engine = AsyncEngine(others)
        async with aclosing(engine.generate([1], ENDLESS)) as running:
            first = asyncio.create_task(anext(running))
            await asyncio.to_thread(entered.wait, LIMIT_S)
            waits = asyncio.create_task(read(engine.generate([2], SAMPLED)))
            await asyncio.sleep(0)  # the task starts
            clock.now, clock.ran = clock.now - 1e6, clock.ran + 900
            soon = asyncio.create_task(read(engine.generate([3], SAMPLED)))
            await asyncio.sleep(0)
            clock.ran += 200
            go_on.set()
            await first
            [late] = await waits
            assert late.outputs[0].finish_reason == "error" and not soon.done()
        assert tokens_of(await soon) == alone((3,), SAMPLED)
        engine.shutdown()

    for module in (engine_module, async_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(others, "step", long_step)
    run(test())


def test_a_request_that_fails_is_an_output(engine: AsyncEngine) -> None:
    async def test() -> None:
        without_law = replace(SAMPLED, logit_bias=dict.fromkeys(range(VOCAB), -math.inf))
        failed, other = await asyncio.gather(read(engine.generate([1], without_law)), read(engine.generate([2], SAMPLED)))
        assert failed[-1].outputs[0].finish_reason == "error"
        assert failed[-1].outputs[0].error is not None
        assert tokens_of(other) == alone((2,), SAMPLED)

    run(test())


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_abort(kind: RequestOutputKind, engine: AsyncEngine) -> None:
    """The consumer gets what there is. Names without a request are ignored."""

    async def test() -> None:
        reader = asyncio.create_task(read(engine.generate([1], ENDLESS.giving(kind), "endless")))
        assert tokens_of(await read(engine.generate([2], SAMPLED))) == alone((2,), SAMPLED)
        await engine.abort("endless")
        check_free(engine)
        found = [output.outputs[0] for output in await reader]
        assert [one.finish_reason for one in found] == [None] * (len(found) - 1) + ["abort"]
        token_ids = chained(found if kind is DELTA else found[-1:], "token_ids")
        longer = replace(ENDLESS, max_tokens=len(token_ids) + 10)  # just before max_tokens, trees become smaller
        assert token_ids == alone((1,), longer)[: len(token_ids)]
        await engine.abort("endless")

    run(test())


def test_shutdown(engine: AsyncEngine) -> None:
    async def test() -> None:
        readers = [asyncio.create_task(read(engine.generate([token], ENDLESS))) for token in range(5)]  # two of them wait
        await read(engine.generate([1], SAMPLED, priority=-1))
        engine.shutdown()
        check_free(engine)
        for outputs in await asyncio.gather(*readers):
            assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        with pytest.raises(RuntimeError, match="shut down"):
            await anext(engine.generate([1], SAMPLED))
        await engine.abort("1")
        engine.shutdown()

    run(test())


def test_the_thread_ends_with_its_engine() -> None:
    engine = AsyncEngine(table_engine())
    thread = engine._worker._thread
    run(read(engine.generate([1], SAMPLED)))
    assert thread.is_alive()
    del engine
    gc.collect()
    assert not thread.is_alive()


# --- The queue of new requests


class Held:
    """Holds back the steps of an engine until `go_on`. Counts the requests that are added before each step."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.entered, self.go_on, self.added = threading.Event(), threading.Event(), [0]
        step, add = engine.step, engine.add_request

        def held_step() -> list[RequestOutput]:
            self.entered.set()
            assert self.go_on.wait(LIMIT_S)
            self.added.append(0)
            return step()

        def counted_add(*given: Any, **options: Any) -> Any:
            self.added[-1] += 1
            return add(*given, **options)

        monkeypatch.setattr(engine, "step", held_step)
        monkeypatch.setattr(engine, "add_request", counted_add)


async def started(*tests: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Starts tasks, in order."""
    tasks = [asyncio.create_task(one) for one in tests]
    await asyncio.sleep(0)
    return tasks


def test_the_queue_of_new_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step runs, two enter, and the others wait without blocking their loop. They enter in order, two a step."""
    others = table_engine()
    held = Held(others, monkeypatch)

    async def test() -> None:
        engine = AsyncEngine(others, most_new=2)
        worker, prompts = engine._worker, [(1, token) for token in range(VOCAB)]
        readers = await started(read(engine.generate([1], SAMPLED)))
        await asyncio.to_thread(held.entered.wait, LIMIT_S)
        readers += await started(*(read(engine.generate(prompt, SAMPLED)) for prompt in prompts * 3))
        assert len(worker._new) == 18
        held.go_on.set()
        for prompt, outputs in zip([(1,), *prompts * 3], await asyncio.gather(*readers), strict=True):
            assert tokens_of(outputs) == alone(prompt, SAMPLED)
        numbers = [int(reader.result()[0].request_id) for reader in readers]
        assert numbers == sorted(numbers)
        assert max(held.added) <= 2 and sum(held.added) == 19
        assert not worker._new and not worker._named
        engine.shutdown()
        check_free(engine)

    run(test())


def test_leaving_and_aborting_while_the_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits to enter can be cancelled and aborted; its name is in use. Those that run can be aborted too."""
    others = table_engine()
    held = Held(others, monkeypatch)

    async def test() -> None:
        engine = AsyncEngine(others, most_new=1)
        [running] = await started(read(engine.generate([1], ENDLESS, "running")))
        await asyncio.to_thread(held.entered.wait, LIMIT_S)
        names = ["enters", "cancelled", "aborted", "waits"]
        enters, cancelled, aborted, waits = await started(*(read(engine.generate([2], SAMPLED, name)) for name in names))
        with pytest.raises(UserError, match="'waits' is still running"):
            await anext(engine.generate([3], SAMPLED, "waits"))
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert [newcomer.name for newcomer in engine._worker._new.values()] == ["enters", "aborted", "waits"]
        aborts = await started(engine.abort("aborted"), engine.abort("running"))
        held.go_on.set()
        await asyncio.gather(*aborts)
        for reader in (aborted, running):
            assert (await reader)[-1].outputs[0].finish_reason == "abort"
        assert not (await aborted)[-1].outputs[0].token_ids
        assert tokens_of(await enters) == tokens_of(await waits) == alone((2,), SAMPLED)
        assert not engine._worker._new and not engine._worker._named
        engine.shutdown()
        check_free(engine)

    run(test())


def test_priorities_and_blocked_loops_while_the_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of smaller priority enter first. Those of a loop that is blocked enter without it, so they hold up nobody."""
    others = table_engine()
    held = Held(others, monkeypatch)

    async def test() -> None:
        engine = AsyncEngine(others, most_new=1)
        readers = await started(read(engine.generate([1], SAMPLED)))
        await asyncio.to_thread(held.entered.wait, LIMIT_S)
        readers += await started(*(read(engine.generate([2], SAMPLED, priority=priority)) for priority in (1, 0, 0, -1)))
        held.go_on.set()
        while engine._worker._new:  # the loop is blocked meanwhile
            time.sleep(0.001)
        numbers = [int(outputs[0].request_id) for outputs in await asyncio.gather(*readers)]
        assert numbers == [0, 4, 2, 3, 1]
        engine.shutdown()
        check_free(engine)

    run(test())


def test_no_new_requests_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="most_new must be at least 1, got 0"):
        AsyncEngine(table_engine(), most_new=0)


def test_shutdown_while_the_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    others = table_engine()
    held = Held(others, monkeypatch)

    async def test() -> None:
        engine = AsyncEngine(others, most_new=1)
        [running] = await started(read(engine.generate([1], ENDLESS)))
        await asyncio.to_thread(held.entered.wait, LIMIT_S)
        readers = await started(*(read(engine.generate([token], SAMPLED)) for token in (1, 2, 3, 4)))
        end = asyncio.create_task(asyncio.to_thread(engine.shutdown))
        found = await asyncio.gather(*readers, return_exceptions=True)
        assert ["shut down" in str(error) for error in found] == [True] * 4
        held.go_on.set()
        await end
        assert (await running)[-1].outputs[0].finish_reason == "abort"
        check_free(engine)

    run(test())


def test_loops_that_wait_to_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several loops share the queue. One is closed while its requests wait, which holds up nobody."""
    others = table_engine()
    held, engine = Held(others, monkeypatch), AsyncEngine(others, most_new=1)
    loop, found = asyncio.new_event_loop(), dict[int, list[list[RequestOutput]]]()
    gone = [engine.generate([5], SAMPLED, name) for name in ("a", "b", "c", "d")]

    async def leaves() -> list[asyncio.Task[Any]]:
        tasks = await started(anext(gone[0]))
        await asyncio.to_thread(held.entered.wait, LIMIT_S)
        return tasks + await started(*map(anext, gone[1:]))

    async def several(token: int) -> None:
        names = ["c", "d", None] if token == 1 else [None] * 3
        found[token] = await asyncio.gather(*(read(engine.generate([token, i], SAMPLED, names[i])) for i in range(3)))

    tasks = loop.run_until_complete(leaves())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    assert len(engine._worker._new) == 3
    threads = [threading.Thread(target=lambda token=token: run(several(token))) for token in (1, 2)]
    for thread in threads:
        thread.start()
    held.go_on.set()
    for thread in threads:
        thread.join(LIMIT_S)
    for token in (1, 2):
        assert [tokens_of(outputs) for outputs in found[token]] == [alone((token, i), SAMPLED) for i in range(3)]
    engine.shutdown()
    check_free(engine)
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]


# --- Several loops, and what happens during a step


def test_two_loops(engine: AsyncEngine) -> None:
    found: dict[int, list[list[RequestOutput]]] = {}

    async def several(token: int) -> None:
        prompts = [[token, other] for other in range(4)]
        found[token] = await asyncio.gather(*(read(engine.generate(prompt, SAMPLED)) for prompt in prompts))

    threads = [threading.Thread(target=lambda token=token: run(several(token))) for token in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    for token in (1, 2):
        assert [tokens_of(outputs) for outputs in found[token]] == [alone((token, i), SAMPLED) for i in range(4)]


def test_a_loop_that_is_closed_before_its_generator(engine: AsyncEngine) -> None:
    """The request ends when the engine has something for it. Later loops are served."""
    loop = asyncio.new_event_loop()
    outputs = engine.generate([1], ENDLESS)
    loop.run_until_complete(anext(outputs))
    loop.close()
    assert tokens_of(run(read(engine.generate([2], SAMPLED)))) == alone((2,), SAMPLED)
    check_free(engine)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_step_reaches_everybody(failure: type, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait for their first step too. The next request works."""
    step, fails = engine.engine.step, threading.Event()

    def failing() -> list[RequestOutput]:
        if fails.is_set():
            fails.clear()
            raise failure("in the middle")
        return step()

    async def caught(outputs: AsyncGenerator[RequestOutput, None]) -> str:
        with pytest.raises(failure) as found:
            await read(outputs)
        return str(found.value)

    async def test() -> None:
        readers = [asyncio.create_task(caught(engine.generate([token], ENDLESS))) for token in range(5)]
        await read(engine.generate([1], SAMPLED, priority=-1))
        fails.set()
        assert await asyncio.gather(*readers) == ["in the middle"] * 5
        await settled(engine)
        check_free(engine)
        assert tokens_of(await read(engine.generate([1], SAMPLED))) == alone((1,), SAMPLED)

    monkeypatch.setattr(engine.engine, "step", failing)
    run(test())


def test_nothing_blocks_the_loop_during_a_step(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are checked and queued, and consumers leave, while a step holds the lock of the engine."""
    step, entered, go_on = engine.engine.step, threading.Event(), threading.Event()

    def long_step() -> list[RequestOutput]:
        with engine.engine.lock:
            entered.set()
            assert go_on.wait(LIMIT_S)
            return step()

    async def test() -> None:
        first = asyncio.create_task(read(engine.generate([1], SAMPLED)))
        await asyncio.to_thread(entered.wait, LIMIT_S)
        second = asyncio.create_task(read(engine.generate([2], SAMPLED)))
        with pytest.raises(UserError):
            engine.generate([], SAMPLED)
        await left_before_its_first_step(engine)
        assert not first.done() and not second.done()
        go_on.set()
        assert tokens_of(await first) == alone((1,), SAMPLED)
        assert tokens_of(await second) == alone((2,), SAMPLED)

    monkeypatch.setattr(engine.engine, "step", long_step)
    run(test())
