"""Builds what a speculative config means on one model: drafter, tree policy, rule and budget, and their engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from foredraft.core.costs import Costs
from foredraft.core.folders import BUNDLED_LM
from foredraft.core.params import SamplingParams
from foredraft.core.setting import Setting
from foredraft.core.shape import MAX_DEPTH, Budget
from foredraft.drafters import DRAFTERS
from foredraft.drafters.mixed import MixedDrafter
from foredraft.engine.drafting import Drafting
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from foredraft.models.parts import ModelParts
from foredraft.plan.choice import Choice
from foredraft.plan.choose import Chooser
from foredraft.plan.config import bundled_drafter
from foredraft.plan.measure import sample_prompt
from foredraft.plan.rows import rows_of_step
from foredraft.plan.speculation import KINDS, PLAIN, Speculation, Way, kind_of
from foredraft.plan.store import read_calibration
from foredraft.rules.multiround import ForSampled
from foredraft.trees.base import ByTemperature

MEMORY = "foredraft.memory"
"""Name of the logger that says what the keys and values of an engine may take."""

_DESCRIBED = ("method", "tree", "budget", "rule", "expected_speedup", "timed_on", "reason")


@dataclass(frozen=True)
class Plan:
    """What a speculative config means on one model. What the config leaves open is chosen when it is first needed.

    Attributes:
        parts: the target, and what was loaded with it.
        speculation: the checked config.
        fixed_load: number of running requests that is assumed for a request that keeps its number of nodes.
    """

    parts: ModelParts
    speculation: Speculation
    fixed_load: int

    @property
    def source(self) -> Any:
        """The draft model as given by the user, else the bundled one; None if there is no draft model."""
        if self.speculation.model is None and self.parts.is_bundled and self.speculation.needs_model:
            return bundled_drafter(self.speculation.calibrated)
        return self.speculation.model

    @property
    def weights(self) -> str | None:
        """Fingerprint of the drafter's weights; None if it has no weights."""
        return self.parts.draft_fingerprint(self.source)

    def measured(self) -> dict[str, Any]:
        """Reads the calibration of the drafter, see `foredraft.plan.store.read_calibration`."""
        source, name = self.source, self.speculation.calibrated
        if source is None and self.parts.is_bundled and DRAFTERS[name].weights is None:
            source = BUNDLED_LM  # its calibration file also covers drafters without weights
        return read_calibration(source, self.parts.target, name, self.parts.draft_fingerprint(source))

    def grown_by(self, grower: Any, name: str) -> Any:
        """Builds a drafter with a tree policy, which is None for a drafter that makes its own tree.

        Args:
            name: name of the drafter in `DRAFTERS`.

        Raises:
            ValueError: the draft model or the head cannot be used.
        """
        parts, row, given = self.parts, DRAFTERS[name], self.speculation.drafter_options
        setting = Setting(
            method=name,
            target=parts.target,
            model=self.source,
            load=parts.draft_model,
            vocabulary=parts.vocabulary,
            grower=grower,
            fingerprint=lambda: parts.fingerprint,
        )
        return row.build(setting, **{key: given[key] for key in row.options if key in given})

    def drafter(self, greedy: Way, sampled: Way) -> Any:
        """Builds a drafter that drafts greedy requests one way and sampled requests another."""
        if greedy.drafter != sampled.drafter:
            return MixedDrafter(self.drafter(greedy, greedy), self.drafter(sampled, sampled))
        measured = self.measured()
        grower = self.speculation.grower(sampled.tree, measured)
        if greedy != sampled:
            grower = ByTemperature(self.speculation.grower(greedy.tree, measured), grower)
        return self.grown_by(grower, sampled.drafter)

    @cached_property
    def choices(self) -> dict[str, Choice]:
        """Kind of request -> what was chosen for it; empty if the config leaves nothing open.

        Steps are timed on this machine, and their times are kept in the user's cache.
        """
        if not self.speculation.is_open:
            return {}
        target, parts = self.parts.target, self.parts
        return Chooser(
            target=target,
            speculation=self.speculation,
            has_model=self.source is not None,
            build=lambda way: self.drafter(way, way),
            measured=self.measured(),
            prompt=sample_prompt(parts.tokenizer, target.vocab_size, parts.max_model_len),
            weights=[parts.fingerprint, self.weights],
        ).choose()

    def way(self, kind: str) -> Way:
        """Returns the drafter and the tree for a kind of requests."""
        return self.choices[kind].way if self.choices else Way(self.speculation.drafter, self.speculation.tree)

    def nodes(self, kind: str) -> int:
        """Returns the maximum number of tree nodes for a kind of requests; 0 means plain decoding."""
        return self.speculation.budget.nodes if self.speculation.budget else self.choices[kind].nodes

    def costs(self, kind: str) -> Costs | None:
        """Returns the costs by which budgets follow load and acceptance; None if the config fixes the budget."""
        found = self.choices[kind].costs if self.choices else None
        return None if found is None else Costs.read(found)

    def engine_options(self) -> dict[str, Any]:
        """Returns the arguments of `Engine` that say what is drafted. Empty if no request is drafted."""
        if self.choices and not any(choice.nodes for choice in self.choices.values()):
            return {}
        nodes = {kind: self.nodes(kind) for kind in KINDS}
        used = {kind: self.way(kind) for kind in KINDS if nodes[kind]}
        greedy, sampled = (used.get(kind) or next(iter(used.values())) for kind in KINDS)  # an unused kind borrows a way
        rule, most = self.speculation.rule_for(sampled.tree), max(nodes.values())
        costs = {kind: self.costs(kind) for kind in KINDS}
        return {
            "drafter": self.drafter(greedy, sampled),
            "rule": ForSampled(rule) if sampled != greedy and self.speculation.rule_name is None else rule,
            "budget": Budget(most, min(most, MAX_DEPTH)),
            "max_nodes": lambda sampling: nodes[kind_of(sampling)],
            "costs": lambda sampling: costs[kind_of(sampling)],
            "name": self.speculation.drafter,
            "fixed_load": self.fixed_load,
        }

    def drafting(self) -> list[Drafting]:
        """Returns this way of drafting for an engine that has another by default; none if it drafts nothing."""
        options = self.engine_options()
        return [Drafting(options.pop("drafter"), options.pop("rule"), options.pop("budget"), **options)] if options else []


def describe(plan: Plan | None, sampling: SamplingParams) -> dict[str, Any]:
    """Describes how a request is drafted, see `foredraft.llm.LLM.drafting`. No plan is plain decoding."""
    found = dict.fromkeys(_DESCRIBED) | {"method": PLAIN}
    if plan is not None:
        kind = kind_of(sampling)
        way, choice = plan.way(kind), plan.choices.get(kind)
        values = [*way, plan.nodes(kind), plan.speculation.rule_name_for(way.tree)]
        values += [choice.speedup, choice.timed_on, choice.reason] if choice else []
        found |= dict(zip(_DESCRIBED, values, strict=False))
    return found


def make_engine(
    parts: ModelParts, plan: Plan | None, options: EngineOptions, *, seed: int, others: Sequence[Plan] = ()
) -> Engine:
    """Builds the engine that runs a plan. No plan is plain decoding.

    Args:
        others: further plans, which requests choose by the name of their method.
        seed: seed for requests that set none.
    """
    if options.max_num_batched_tokens is None:
        options = replace(options, max_num_batched_tokens=rows_of_step(parts.target, [parts.fingerprint]))
    engine = Engine(
        parts.target,
        tokenizer=parts.tokenizer,
        max_model_len=parts.max_model_len,
        options=options,
        seed=seed,
        eos_ids=parts.eos_ids,
        others=[drafting for other in others for drafting in other.drafting()],
        **(plan.engine_options() if plan else {}),
    )
    logging.getLogger(MEMORY).info("%s", engine.memory)
    return engine
