"""The threads of the compiled decoder give the bits of one thread wherever they run, and end: on one core, after forks, beside
other threads and processes.

Every test runs a function of this file in a process of its own, whose affinity and forks concern no other test.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from foredraft import LLM, SamplingParams, kernels
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.tree import TreeBatch
from foredraft.engine.one_thread import one_thread

LIMIT_S = 90
"""Seconds after which a process counts as hanging. It takes one on an idle machine."""

REST_S = 0.15
"""Seconds after which a thread without work sleeps."""

END = "ended with"
THREADS = 2
PROMPT = "<|user|>\nName three rivers.\n<|assistant|>\n"
SPECULATIVE = {"method": "suffix", "num_speculative_tokens": 8}

Decode = Callable[[], list[Any]]


def decoder(threads: int = THREADS, dtype: str = "bfloat16") -> Decode:
    """Returns a function that decodes greedily with the bundled target. It returns all tokens, and the bits of their logits."""
    torch.set_num_threads(threads)
    llm = LLM(BUNDLED_TARGET, SPECULATIVE, dtype=dtype)
    assert llm.target._threads == threads
    torch.set_num_threads(THREADS)

    def decode() -> list[Any]:
        [result] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
        token_ids = [*result.prompt_token_ids, *result.outputs[0].token_ids]
        with one_thread:  # threads of torch that were started before a fork would be waited for after it
            cache = llm.target.new_pool(8).allocate()
            logits = llm.target.forward(TreeBatch.chains([token_ids]), [cache]).logits
        return [token_ids, hashlib.sha256(logits.numpy()).hexdigest()]

    return decode


@cache
def wanted(dtype: str = "bfloat16") -> list[Any]:
    """Returns what one thread decodes."""
    return decoder(1, dtype)()


def check(decode: Decode, times: int = 2, dtype: str = "bfloat16") -> None:
    for _ in range(times):
        assert decode() == wanted(dtype)


def run_and_exit(function: Callable[[], Any]) -> NoReturn:
    """Ends this process: with 0 if the function raises nothing."""
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def in_child(function: Callable[[], Any]) -> int:
    """Runs a function in a child. Returns its id."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT_S // 2)  # ends a child that hangs
        run_and_exit(function)
    return child


def ended_well(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def confine(cores: set[int], *, everything: bool) -> None:
    """Sets the affinity of the caller, or of every thread of this process."""
    for thread in os.listdir("/proc/self/task") if everything else ("0",):
        os.sched_setaffinity(int(thread), cores)


def on_one_core() -> None:
    """More threads than cores, from the start."""
    confine({min(os.sched_getaffinity(0))}, everything=True)
    for threads in (2, 5):
        check(decoder(threads))


def affinity_shrinks() -> None:
    """After the threads have started: of the caller alone, then of all, then back."""
    cores, decode = os.sched_getaffinity(0), decoder()
    check(decode)
    for core in cores:
        for everything in (False, True):
            confine({core}, everything=everything)
            check(decode)
    confine(cores, everything=True)
    check(decode)


def forks() -> None:
    """While the other thread sleeps. Children and their children decode beside the parent."""
    decode = decoder()
    check(decode)

    def decode_and_rest() -> None:
        for _ in range(3):
            check(decode, 1)
            time.sleep(REST_S)

    def decode_and_fork() -> None:
        decode_and_rest()
        grandchild = in_child(decode_and_rest)
        check(decode)
        assert ended_well(grandchild)

    time.sleep(REST_S)
    children = [in_child(decode_and_fork) for _ in range(2)]
    check(decode)
    assert all(map(ended_well, children))


def forks_during_a_step() -> None:
    """A child lacks the thread that would end the step, whatever locks it held. Long steps, so that a fork falls into one."""
    decode, other = decoder(), LLM(BUNDLED_TARGET, {"method": "ar"})
    going, stop = threading.Event(), threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            other.generate(PROMPT * 20, SamplingParams(temperature=0, max_tokens=1))
            going.set()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        going.wait()
        for _ in range(4):
            assert ended_well(in_child(lambda: check(decode)))
    finally:
        stop.set()
    thread.join()


def two_models() -> None:
    """In turns, then each from a thread of its own. Torch keeps its number of threads."""
    models = {dtype: decoder(dtype=dtype) for dtype in ("bfloat16", "float32")}
    for dtype, decode in [*models.items()] * 2:
        check(decode, 1, dtype)
    done: list[str] = []

    def decode_alone(dtype: str) -> None:
        check(models[dtype], 6, dtype)
        done.append(dtype)

    for _ in range(2):
        run_together([partial(decode_alone, dtype) for dtype in models])
    assert sorted(done) == sorted([*models] * 2)
    counts = [torch.get_num_threads()]
    run_together([lambda: counts.append(torch.get_num_threads())])
    assert counts == [THREADS] * 2


def run_together(functions: list[Callable[[], None]]) -> None:
    """Runs each function in a thread of its own."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def spin() -> None:
    while True:
        pass


def beside_busy_processes() -> None:
    """Two of them for every core."""
    others = [in_child(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        check(decoder())
    finally:
        for process in others:
            os.kill(process, signal.SIGKILL)


SCENARIOS = {
    function.__name__: function
    for function in (on_one_core, affinity_shrinks, forks, forks_during_a_step, two_models, beside_busy_processes)
}


def serve() -> None:
    """Runs every scenario that is named on a line of the input in a child, and prints how it ended."""
    wanted("bfloat16"), wanted("float32")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT_S)
            run_and_exit(SCENARIOS[line.strip()])
        print(END, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that runs `serve`. It has loaded everything, but has started no threads."""
    command = [sys.executable, str(Path(__file__))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(kernels.library() is None, reason="no compiled kernels run here")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "beside_busy_processes" else []) for name in SCENARIOS]
)
def test_threads(name: str, server: subprocess.Popen[str]) -> None:
    print(name, file=server.stdin, flush=True)
    said = []
    for line in server.stdout:
        said.append(line)
        if line.startswith(END):
            break
    assert said[-1:] == [f"{END} 0\n"], f"it hangs if it ended with {-signal.SIGALRM}:\n{''.join(said)[-3000:]}"


if __name__ == "__main__":
    serve()
