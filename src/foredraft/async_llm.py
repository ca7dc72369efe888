"""`AsyncLLM`, the entry point for event loops: requests come and go one by one, and each is an asynchronous generator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Unpack

from foredraft.core.arguments import takes_other_names
from foredraft.core.chat import Template
from foredraft.core.messages import Message
from foredraft.core.outputs import RequestOutput
from foredraft.core.params import SamplingParams
from foredraft.core.prompts import Prompt, with_params
from foredraft.core.treatment import CHAT, RUN
from foredraft.engine.async_engine import AsyncEngine
from foredraft.llm import LLM


class AsyncLLM:
    """An `LLM` whose requests are asynchronous generators. One thread runs all of them as a batch.

    Requests may come from several event loops. As an asynchronous context manager, it calls `shutdown` at the end.

    Args:
        model, speculative_config, options: as in `LLM`, with the same errors.
    """

    def __init__(self, model: Any = None, speculative_config: Mapping[str, Any] | None = None, **options: Any):
        self._llm = LLM(model, speculative_config, **options)
        self.engine = AsyncEngine(self._llm.engine)

    @classmethod
    def of(cls, llm: LLM) -> AsyncLLM:
        """Returns an `AsyncLLM` on the weights of an `LLM`, with its speculative config and its options.

        It has an engine and keys and values of its own. Only one of the two may run requests at a time, because not every
        model can run from two threads.
        """
        other = cls.__new__(cls)
        other._llm, other.engine = llm, AsyncEngine(llm.new_engine())
        return other

    @takes_other_names(RUN)
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates for one prompt, see `foredraft.engine.async_engine.AsyncEngine.generate`.

        Args:
            prompt: as in `LLM.generate`, but only one.
            sampling_params: its `output_kind` says what the outputs hold. None is `LLM.get_default_sampling_params`.
            request_id: a name for `abort`.
            priority: a request of smaller priority is served first.
        """
        [(prompt, sampling)] = with_params([prompt], sampling_params, self._llm.default_params_for)
        return self.engine.generate(prompt, sampling, request_id, priority=priority)

    @takes_other_names(CHAT, Template.__annotations__)
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **template: Unpack[Template],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers one conversation: renders the chat template as `LLM.chat` does, then calls `generate`."""
        prompt = self._llm.chat_prompt(messages, **template)
        return self.generate(prompt, sampling_params, request_id, priority=priority)

    async def abort(self, request_id: str) -> None:
        """Ends a request, see `foredraft.engine.async_engine.AsyncEngine.abort`."""
        await self.engine.abort(request_id)

    def shutdown(self) -> None:
        """Aborts all requests and ends the thread. Waits for the step that runs. May be called again."""
        self.engine.shutdown()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)
