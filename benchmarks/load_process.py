"""Runs one engine under load for benchmarks/load.py, in a process of its own. vLLM's Python needs nothing of foredraft.

    python load_process.py KIND OPTIONS

KIND is one of KINDS, and OPTIONS is a JSON object. When the engine is ready, the process prints facts about it. Then it reads
one JSON object per line, and answers each with a line:

    {"prompts": [[ids]], "limits": [n], "arrivals": [s] | null, "at_once": 16}
    {"requests": [[arrived_s, [[delivered_s, num_tokens], ...]], ...]}

With arrival times, every request is sent at its time and may wait in the engine. Without them, `at_once` requests are
unfinished all the time, as long as requests are left. The clock starts when the object is read.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, closing
from functools import partial
from time import perf_counter, sleep
from typing import Any

Deliveries = list[tuple[float, int]]

START_S = 120
"""Seconds within which a server must be ready."""


class Streaming:
    """An engine with an asynchronous stream for each request. A subclass gives `stream` and `facts`."""

    facts: dict[str, Any]

    def stream(self, prompt: list[int], limit: int) -> AsyncGenerator[int, None]:
        """Yields the number of tokens of each delivery."""
        raise NotImplementedError

    def run(self, ask: dict[str, Any]) -> list[Any]:
        """Runs the requests, and returns the arrival and the deliveries of each."""
        return asyncio.run(self._run(ask))

    async def _run(self, ask: dict[str, Any]) -> list[Any]:
        began, found = perf_counter(), {}

        async def serve(number: int, arrived: float) -> None:
            deliveries = []
            async with aclosing(self.stream(ask["prompts"][number], ask["limits"][number])) as counts:
                async for count in counts:
                    deliveries.append((perf_counter() - began, count))
            found[number] = arrived, deliveries

        async def at_its_time(number: int) -> None:
            await asyncio.sleep(max(0.0, began + ask["arrivals"][number] - perf_counter()))
            await serve(number, ask["arrivals"][number])

        async def one_after_another(numbers: Iterator[int]) -> None:
            for number in numbers:
                await serve(number, perf_counter() - began)

        numbers = iter(range(len(ask["prompts"])))
        if ask["arrivals"] is None:
            await asyncio.gather(*(one_after_another(numbers) for _ in range(ask["at_once"])))
        else:
            await asyncio.gather(*map(at_its_time, numbers))
        return [found[number] for number in sorted(found)]


class Foredraft(Streaming):
    """foredraft's `AsyncLLM`."""

    def __init__(self, options: dict[str, Any]):
        from foredraft import AsyncLLM, RequestOutputKind, SamplingParams
        from foredraft.kernels.sets import sets_here

        limits = {name: options[name] for name in ("dtype", "max_num_seqs", "max_model_len")}
        limits |= options.get("options", {})
        self._llm = AsyncLLM(options["model"], options["config"], device="cpu", enable_prefix_caching=False, **limits)
        self._params = partial(SamplingParams, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        self.facts = {"config": options["config"], "instruction_set": sets_here(), **options.get("options", {})}

    async def stream(self, prompt: list[int], limit: int) -> AsyncGenerator[int, None]:
        """Yields the number of tokens of each delivery."""
        outputs = self._llm.generate({"prompt_token_ids": prompt}, self._params(max_tokens=limit))
        async with aclosing(outputs):
            async for output in outputs:
                yield len(output.outputs[0].token_ids)


class LlamaServer(Streaming):
    """llama.cpp's `llama-server` on the loopback interface, with server-sent events."""

    def __init__(self, options: dict[str, Any]):
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        seqs = options["max_num_seqs"]
        command = [options["program"], "-m", options["file"], "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["-t", str(_cores()), "-np", str(seqs), "-c", str(seqs * options["max_model_len"]), "--cache-ram", "0"]
        command += ["--no-webui", "--cont-batching", "--flash-attn", "auto", "--log-disable", *options.get("flags", [])]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr)
        self.facts = {"flags": " ".join(command[7:])}
        self._wait()

    def _wait(self) -> None:
        until = perf_counter() + START_S
        while perf_counter() < until and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self._port)) as connection:
                    connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                    if b" 200 " in connection.recv(64):
                        return
            except OSError:
                pass
            sleep(0.2)
        raise RuntimeError("llama-server did not start")

    async def stream(self, prompt: list[int], limit: int) -> AsyncGenerator[int, None]:
        """Yields the number of tokens of each delivery."""
        ask = {"prompt": prompt, "n_predict": limit, "ignore_eos": True, "stream": True, "cache_prompt": False}
        ask |= {"samplers": ["top_k"], "top_k": 1, "return_tokens": True}
        body = json.dumps(ask).encode()
        head = f"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        try:
            writer.write(head.encode() + body)
            async for line in reader:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if event.get("tokens") and not event["stop"]:
                        yield len(event["tokens"])
                    elif "error" in event:
                        raise RuntimeError(event["error"])
        finally:
            writer.close()


class VLLM:
    """vLLM's `LLMEngine` in one process: requests are added between its steps."""

    def __init__(self, options: dict[str, Any]):
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        limits = {name: options[name] for name in ("model", "dtype", "max_num_seqs", "max_model_len")}
        limits |= {"max_num_batched_tokens": 2048, "enable_prefix_caching": False, "skip_tokenizer_init": True}
        limits |= {"disable_log_stats": True, **options.get("options", {})}
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**limits))
        self._params = partial(
            vllm.SamplingParams, temperature=0.0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        openmp = "intel" if "libiomp" in os.environ.get("LD_PRELOAD", "") else "gnu"
        self.facts = {"version": vllm.__version__, "max_num_batched_tokens": limits["max_num_batched_tokens"], "openmp": openmp}
        self._number = 0

    def run(self, ask: dict[str, Any]) -> list[Any]:
        """Runs the requests, and returns the arrival and the deliveries of each."""
        began, count, arrivals = perf_counter(), len(ask["prompts"]), ask["arrivals"]
        arrived: list[float] = []
        deliveries: list[Deliveries] = [[] for _ in range(count)]
        first, ended = self._number, 0
        while ended < count:
            now = perf_counter() - began
            while len(arrived) < count:
                number = len(arrived)
                if arrivals[number] > now if arrivals else number - ended >= ask["at_once"]:
                    break
                self._add(ask["prompts"][number], ask["limits"][number])
                arrived.append(arrivals[number] if arrivals else now)
            if ended == len(arrived):
                sleep(max(0.0, arrivals[ended] - now))
                continue
            for output in self._engine.step():
                tokens = len(output.outputs[0].token_ids)
                if tokens:
                    deliveries[int(output.request_id) - first].append((perf_counter() - began, tokens))
                ended += output.finished
        return list(zip(arrived, deliveries, strict=True))

    def _add(self, prompt: list[int], limit: int) -> None:
        self._engine.add_request(str(self._number), {"prompt_token_ids": prompt}, self._params(max_tokens=limit))
        self._number += 1


KINDS: dict[str, Any] = {"foredraft": Foredraft, "vllm": VLLM, "llama.cpp": LlamaServer}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    """Answers questions until standard input ends."""
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the engine's own output must not mix with the answers
    engine = KINDS[kind](options)
    print(json.dumps(engine.facts), file=answers)
    for line in sys.stdin:
        print(json.dumps({"requests": engine.run(json.loads(line))}), file=answers)
    os._exit(0)


if __name__ == "__main__":
    main()
