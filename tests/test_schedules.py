"""Random schedules of an engine: requests join, leave, are aborted and preempted, share prefixes and are cut into chunks.

After every event, the blocks in use are those of the running requests. In the end, every request has the tokens which it
has alone, in an engine with ample memory that shares nothing. Tables are compared in float64, the compiled decoder bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from foredraft import LLM
from foredraft.cache.blocks import num_blocks
from foredraft.core.contracts import Budget
from foredraft.core.output_kind import RequestOutputKind
from foredraft.core.params import SamplingParams
from foredraft.drafters.lm import LMDrafter
from foredraft.drafters.lookup_first import LookupFirst
from foredraft.drafters.mixed import MixedDrafter
from foredraft.drafters.ngram import NgramDrafter
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from foredraft.engine.request import Request
from foredraft.models.table import TableTarget, random_law
from foredraft.rules import RULES
from foredraft.rules.multiround import ForSampled
from foredraft.trees import GROWERS

VOCAB, LONGEST = 6, 96
LAW, DRAFT = random_law(VOCAB, 1, concentration=0.3), random_law(VOCAB, 2, concentration=0.3)
SCRIPTS, GROUPS, COMPILED = 2000, 20, 100
QUIET = EngineOptions(max_num_seqs=2, enable_prefix_caching=False)


def hashed(law: Any) -> Callable[[tuple[int, ...]], Any]:
    """A law of the whole prefix with few different rows, so that long prefixes are cheap."""
    return lambda prefix: law((hash(prefix) % 997, prefix[-1]))


def model_drafter(tree: str) -> LMDrafter:
    return LMDrafter(TableTarget(hashed(DRAFT), VOCAB), GROWERS[tree].grower(), VOCAB)


DRAFTING: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "lookup": lambda: {"drafter": NgramDrafter(), "rule": RULES["deterministic"].rule, "budget": Budget(3, 3)},
    "chain": lambda: {"drafter": model_drafter("chain"), "rule": RULES["block"].rule, "budget": Budget(2, 2)},
    "tree": lambda: {"drafter": model_drafter("dyspec"), "rule": RULES["multiround"].rule, "budget": Budget(5, 3)},
    "lookup first": lambda: {
        "drafter": LookupFirst(model_drafter("chain"), 2),
        "rule": RULES["multiround"].rule,
        "budget": Budget(3, 3),
    },
    "mixed": lambda: {
        "drafter": MixedDrafter(model_drafter("opt"), model_drafter("chain")),
        "rule": ForSampled(RULES["block"].rule),
        "budget": Budget(3, 3),
        "max_nodes": lambda sampling: 3 if sampling.temperature else 2,
    },
}


@dataclass
class Script:
    """One engine, and what a random script has asked of it."""

    engine: Engine
    prompts: Sequence[Sequence[int]]
    rng: np.random.Generator
    most_tokens: int
    requests: list[Request] = field(default_factory=list)
    aborted: set[str] = field(default_factory=set)
    seen: dict[str, list[list[int]]] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)

    def run(self, events: int) -> None:
        """Events, then steps until all has ended."""
        for _ in range(events):
            self.event()
            self.check()
        for _ in range(10_000):
            if not self.engine.has_unfinished_requests():
                break
            self.step()
            self.check()
        assert not self.engine.get_num_unfinished_requests()

    def event(self) -> None:
        kind = self.rng.choice(["add", "step", "step", "step", "abort"], p=[0.3, 0.2, 0.2, 0.2, 0.1])
        if kind == "add":
            self.add()
        elif kind == "abort" and self.requests:
            name = self.requests[int(self.rng.integers(len(self.requests)))].request_id
            if name in self.engine._requests:
                self.aborted.add(name)
            self.engine.abort_request(name)
        else:
            self.step()

    def add(self) -> None:
        rng = self.rng
        prompt = list(self.prompts[int(rng.integers(len(self.prompts)))])
        prompt = prompt[: int(rng.integers(1, len(prompt) + 1))]
        sampling = SamplingParams(
            temperature=float(rng.choice([0.0, 0.0, 0.7, 1.0])),
            seed=None if rng.random() < 0.5 else int(rng.integers(1000)),
            max_tokens=int(rng.integers(1, self.most_tokens)),
            n=int(rng.choice([1, 1, 1, 2])),
            output_kind=RequestOutputKind(int(rng.integers(3))),
            ignore_eos=bool(rng.integers(2)),
            prompt_logprobs=0 if rng.random() < 0.05 else None,
        )
        given = {"prompt_token_ids": prompt, "cache_salt": "b" if rng.random() < 0.2 else None}
        self.requests.append(self.engine.add_request(None, given, sampling, priority=int(rng.integers(2))))

    def step(self) -> None:
        for output in self.engine.step():
            request = next(one for one in self.requests if one.request_id == output.request_id)
            kept = self.seen.setdefault(output.request_id, [[] for _ in output.outputs])
            for old, new in zip(kept, output.outputs, strict=True):
                if request.sampling.output_kind is not RequestOutputKind.DELTA:
                    old.clear()
                old += new.token_ids

    def check(self) -> None:
        """The blocks in use are those of the running sequences, and each has as many holders as sequences hold it."""
        scheduler = self.engine.scheduler
        blocks = scheduler.pool.blocks
        held = Counter(block for one in scheduler.running for block in one.cache.blocks)
        assert {block: blocks.num_holders(block) for block in held} == held
        assert blocks.num_free == blocks.count - len(held) and 0 not in held
        assert all(one.cache is None and one.draft_state is None for one in scheduler.waiting)
        assert len(scheduler.running) <= self.engine.options.num_seqs
        self.happened["preempted"] += any(one.records for one in scheduler.waiting)
        self.happened["chunk"] += any(one.num_missing and not one.records for one in scheduler.running)
        self.happened["prefix found"] += any(one.first for one in scheduler.running)


def check_happened(happened: Counter[str]) -> None:
    """The scripts contain what they are meant to contain."""
    assert all(happened[kind] for kind in ("preempted", "chunk", "prefix found")), happened


def check_tokens(script: Script, quiet: Engine, *, has_equal_bits: bool = True) -> None:
    """Requests that ended by themselves have the tokens that they have alone, and every delivery was part of them.

    Args:
        has_equal_bits: whether the logits of a token have the same bits in every step.
    """
    for request in script.requests:
        if request.request_id in script.aborted:
            assert {one.finish_reason for one in request.sequences} <= {"abort", "stop", "length"}
            continue
        wanted = alone(quiet, request)
        assert script.seen[request.request_id] == [one.output_ids for one in request.sequences]
        for one, other in zip(request.sequences, wanted, strict=True):
            assert (one.output_ids, one.kinds, one.finish_reason) == (other.output_ids, other.kinds, other.finish_reason)
            assert one.error is None
        assert not has_equal_bits or request.sequences[0].prompt_logprobs == wanted[0].prompt_logprobs


def alone(engine: Engine, request: Request) -> Sequence[Any]:
    """The same request in an engine that runs nothing else."""
    other = engine.add_request(None, request.prompt_ids, replace(request.sampling, seed=request.seed))
    while not other.is_finished:
        engine.step()
    return other.sequences


@pytest.mark.unchecked
@pytest.mark.parametrize("drafting", DRAFTING)
@pytest.mark.parametrize("group", range(GROUPS))
def test_tables(drafting: str, group: int) -> None:
    """Few blocks, few rows a step, few places; prompts that share prefixes within and over blocks."""
    quiet = Engine(
        TableTarget(hashed(LAW), VOCAB),
        max_model_len=LONGEST,
        options=QUIET,
        eos_ids=[0],
        **DRAFTING[drafting](),
    )
    options, happened = DRAFTING[drafting](), Counter[str]()
    for number in range(-(-SCRIPTS // GROUPS // len(DRAFTING))):
        rng = np.random.default_rng([group, number, *drafting.encode()])
        longest = [rng.integers(VOCAB, size=60).tolist() for _ in range(2)]
        prompts = [*longest, longest[0][:37] + longest[1][:20], longest[0][:32] + longest[1][:28], longest[1][:33]]
        least, is_tight = num_blocks(LONGEST + 6), rng.random() < 0.4
        engine = Engine(
            TableTarget(hashed(LAW), VOCAB),
            max_model_len=LONGEST,
            options=EngineOptions(
                max_num_seqs=int(rng.integers(3 if is_tight else 1, 6)),
                max_num_batched_tokens=int(rng.choice([1, 7, 16, 40, 512])),
                enable_prefix_caching=bool(rng.random() < 0.8),
            ),
            num_kv_blocks=least if is_tight else int(rng.integers(least, 3 * least)),
            eos_ids=[0],
            **options,
        )
        script = Script(engine, prompts, rng, most_tokens=60 if is_tight else 30)
        script.run(events=20)
        check_tokens(script, quiet)
        happened += script.happened
    check_happened(happened)


@cache
def bundled(method: str, tree: str | None) -> LLM:
    config = {"method": method, "num_speculative_tokens": 4} | ({"tree": tree} if tree else {})
    return LLM(speculative_config={"method": "ar"} if method == "ar" else config, dtype="bfloat16")


WAYS: list[tuple[str, str | None]] = [("ar", None), ("suffix", None), ("fspad", "dyspec"), ("fspad", "chain")]
WAYS += [("lm", "chain"), ("ctc", None), ("fspad-lookup", "opt")]


@pytest.mark.parametrize(("method", "tree"), WAYS)
@pytest.mark.parametrize("group", range(5))
def test_compiled(method: str, tree: str | None, group: int) -> None:
    """On the bundled target, whose rows have the same bits in every step where it is compiled."""
    llm = bundled(method, tree)
    options = llm.plan.engine_options() if llm.plan else {}
    common = {"max_model_len": 160, "eos_ids": llm.eos_ids, "tokenizer": llm.tokenizer}
    quiet = Engine(llm.target, options=QUIET, **common, **options)
    for number in range(-(-COMPILED // len(WAYS) // 5)):
        rng = np.random.default_rng([group, number, *f"{method}{tree}".encode()])
        longest = [rng.integers(5, 200, size=100).tolist() for _ in range(2)]
        prompts = [*longest, longest[0][:49] + longest[1][:30], longest[0][:64] + longest[1][:20]]
        least = num_blocks(160 + 16)
        engine = Engine(
            llm.target,
            options=EngineOptions(max_num_seqs=int(rng.integers(1, 6)), max_num_batched_tokens=int(rng.choice([16, 50, 512]))),
            num_kv_blocks=int(rng.integers(least, 2 * least)),
            **common,
            **options,
        )
        script = Script(engine, prompts, rng, most_tokens=24)
        script.run(events=20)
        check_tokens(script, quiet)
