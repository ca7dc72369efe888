"""The audit itself: theory and algorithm by enumeration, greedy output against plain decoding, sampled output against the
target's law, and the same tests on a rule with a planted bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from foredraft.audit.exact import joint_law, target_joint, tree_law
from foredraft.audit.greedy import Divergence, divergence
from foredraft.audit.hypotheses import Evidence
from foredraft.bench.calibrate import all_logits
from foredraft.decode import Continuation
from foredraft.drafters import DRAFTERS
from foredraft.draws import Draws, Key
from foredraft.engine import require_whole
from foredraft.grow import GROWERS
from foredraft.llm import LLM
from foredraft.models.table import random_law
from foredraft.params import SamplingParams
from foredraft.processors import prefix_processors
from foredraft.progress import progress_bar
from foredraft.protocols import AcceptanceRule, Budget
from foredraft.sampling import TargetLaw
from foredraft.speculation import PLAIN
from foredraft.tree import DraftTree, Ids, TreeBatch
from foredraft.verify import RULES

TOLERANCE = 1e-12
SIZES: Mapping[int, int] = {2: 4, 3: 3}
"""Vocabulary -> nodes of the largest trees that are enumerated."""

_DEPTH = 3
_PREFIX = (0,)
PLANTED = 0.15
"""What the negative control adds to every probability of acceptance."""


@dataclass(frozen=True)
class Eager(Draws):
    """Random numbers that accept too often: the planted bias of the negative control."""

    def at(self, num_committed: int) -> Eager:
        """The numbers of a step."""
        return Eager(self.seed, num_committed)

    def bernoulli(self, prob: float, key: Key) -> bool:
        """True with the probability and `PLANTED`."""
        return super().bernoulli(min(1.0, prob + PLANTED), key)


class Drafted(NamedTuple):
    """What was drafted after a node: the law that its children were drawn from, or 1 for each child that was chosen and not
    drawn. Tokens that are left out have 0."""

    token_ids: Ids
    probs: Float[np.ndarray, " n"]

    @classmethod
    def after(cls, tree: DraftTree, node: int) -> Drafted | None:
        """That of one node; None for a leaf. It is settled before any child's token is, so that a test may go by it."""
        law, children = tree.law(node), tree.children[node]
        if law is None:
            return cls(tree.tokens[children], np.ones(len(children))) if children else None
        token_ids = law.nonzero()[:, 0]
        return cls(token_ids.cpu().numpy(), law[token_ids].double().cpu().numpy())

    def over(self, vocab_size: int) -> Float[np.ndarray, " v"]:
        """With an entry for every token."""
        found = np.zeros(vocab_size)
        found[self.token_ids] = self.probs
        return found


@dataclass
class Audit:
    """What was found.

    Attributes:
        setting: model, drafter, tree, rule, sampling parameters, dtype and versions.
        guarantee: the rule's own claim.
        enumerated_error: largest difference between the law of what is emitted and the target's, over all enumerated cases.
        num_greedy, divergences: greedy outputs compared, and where they part from plain decoding.
        sampled, control: tests of sampled output, and of the same with a planted bias; None at temperature 0, and the control
            also for a lossy rule.
        tv_bound_mean, tv_bound_max: what a lossy rule says of itself.
        seconds: of each part.
    """

    setting: dict[str, Any]
    guarantee: str
    enumerated_error: float = 0.0
    num_greedy: int = 0
    num_greedy_tokens: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    sampled: Evidence | None = None
    control: Evidence | None = None
    tv_bound_mean: float = 0.0
    tv_bound_max: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def reasons(self) -> list[str]:
        """Why it is not lossless within the stated power; empty if it is."""
        found = []
        if self.guarantee.startswith("lossy"):
            found.append(f"the rule is {self.guarantee}")
        if self.enumerated_error > TOLERANCE:
            found.append(f"the enumerated law differs from the target's by {self.enumerated_error:.3g}")
        faults = [one for one in self.divergences if not one.is_tie]
        if faults:
            one = faults[0]
            found.append(
                f"{len(faults)} greedy outputs part from plain decoding where rounding does not explain it, the first at token "
                f"{one.position} with a margin of {one.margin:.4g} (rounding {one.rounding:.4g})"
            )
        if self.sampled is not None and self.sampled.impossible:
            found.append(f"{self.sampled.impossible} sampled tokens have probability 0 under the target")
        if self.sampled is not None:
            found += [
                f"sampled tokens deviate: {one.name} {one.statistic:.3g}, p = {one.p_value:.2g}"
                for one in self.sampled.tests()
                if one.deviates
            ]
        if self.control is not None and not self.control.deviates:
            found.append("the audit has no power: it did not find the planted bias; give it more prompts, samples or tokens")
        return found

    @property
    def is_lossless(self) -> bool:
        """Whether nothing spoke against it."""
        return not self.reasons


@dataclass(frozen=True)
class Auditor:
    """Audits one `LLM`.

    Args:
        llm: target, drafter, tree and rule.
        prompts: token ids.
        sampling: of the sampled part; its temperature may be 0, which leaves the greedy part.
        samples: outputs a prompt.
        rule: instead of the one that `llm` would use, for planted faults.
        sizes: vocabulary -> nodes of the largest trees that are enumerated.
        enumerated_error: what an earlier audit of this tree and rule found, which does not hang on the models.
    """

    llm: LLM
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    samples: int
    rule: AcceptanceRule | None = None
    sizes: Mapping[int, int] = field(default_factory=lambda: SIZES)
    enumerated_error: float | None = None
    _drafted: dict[Continuation, list[Drafted | None]] = field(default_factory=dict, init=False, repr=False)

    def run(self) -> Audit:
        """All parts, in order of their cost."""
        drafting = self.llm.drafting(self.sampling)
        if drafting["method"] == PLAIN or not drafting["budget"]:
            raise ValueError(
                "there is nothing to audit: this configuration decodes plainly. Name a method, a tree and a budget"
            )
        assert self.llm.speculation is not None
        guarantee = RULES[drafting["rule"]].claim(self.llm.speculation.rule_options)
        audit = Audit({**drafting, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p}, guarantee)
        clock = perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            audit.seconds[name], clock = perf_counter() - clock, perf_counter()

        known = self.enumerated_error
        audit.enumerated_error = self._enumerated(drafting) if known is None else known
        lap("enumeration")
        self._greedy(audit)
        lap("greedy")
        if self.sampling.temperature > 0:
            audit.sampled = self._sampled(audit, Draws)
            lap("sampled")
            if not guarantee.startswith("lossy"):
                audit.control = self._sampled(None, Eager)
                lap("control")
        return audit

    def _rule_of(self, tree: str | None) -> AcceptanceRule:
        speculation = self.llm.speculation
        assert speculation is not None
        return self.rule or speculation.rule_for(tree)

    def _enumerated(self, drafting: dict[str, Any]) -> float:
        """Largest error over two draft and two target laws, one of each with zeros, sampled and greedy."""
        speculation, tree = self.llm.speculation, drafting["tree"]
        assert speculation is not None
        grower: Any = speculation.grower(tree, self.llm.measured(speculation)) if tree else _stand_in(drafting["method"])
        if hasattr(grower, "width"):
            grower = replace(grower, width=1)  # what wider passes draw in vain multiplies the orders to visit
        worst = 0.0
        cases = [(v, nodes, t) for v, most in self.sizes.items() for nodes in range(1, most + 1) for t in (1.0, 0.0)]
        with progress_bar("enumerating", len(cases)) as advance:
            for size, nodes, temperature in cases:
                worst = max(worst, enumerated_error(grower, self._rule_of(tree), size, nodes, temperature))
                advance(1)
        return worst

    def _greedy(self, audit: Audit) -> None:
        sampling = replace(self.sampling, temperature=0.0)
        plain = self.llm.with_speculation({"method": PLAIN})
        wanted = plain.generate(list(self.prompts), sampling, progress=True)
        require_whole(wanted)
        found = [one.output() for one in self._run(sampling, 1, Draws)]
        for drafted, reference in zip(found, wanted, strict=True):
            pair = reference.outputs[0].token_ids, drafted.outputs[0].token_ids
            part = divergence(plain, reference.prompt_token_ids, *pair)
            audit.num_greedy += 1
            audit.num_greedy_tokens += len(pair[1])
            audit.divergences += [part] if part is not None else []
        self._drafted.clear()  # only sampled tokens are tested against what was drafted

    def _sampled(self, audit: Audit | None, kind: type[Draws]) -> Evidence:
        evidence, rng, bounds = Evidence(), np.random.default_rng(0), []
        for request in self._run(self.sampling, self.samples, kind):
            for one, output in zip(request.continuations, request.output().outputs, strict=True):
                bounds.append(output.metrics)
                for token, law, draft in self._laws(one):
                    evidence.see(token, law, draft, float(rng.random()))
                self._drafted.pop(one, None)
        if audit is not None:
            audit.tv_bound_mean = float(np.mean([one.tv_bound_mean for one in bounds]))
            audit.tv_bound_max = max(one.tv_bound_max for one in bounds)
        return evidence

    def _run(self, sampling: SamplingParams, samples: int, kind: type[Draws]) -> Iterator[Any]:
        """Every prompt, decoded with the audited rule; drops a request when the next one is asked for."""
        engine, rule = self.llm.engine, self.rule
        before = engine.rule
        engine.rule = rule or before
        try:
            with progress_bar("decoding", len(self.prompts)) as advance:
                for number, prompt in enumerate(self.prompts):
                    request = engine.add(None, prompt, replace(sampling, n=samples, seed=number))
                    for one in request.continuations:
                        one.draws = kind(one.draws.seed)
                    seen = {one: one.num_prompt for one in request.continuations}
                    for running in engine.run([request]):
                        for one in running:
                            self._note(one, seen[one])
                            seen[one] = len(one.token_ids)
                    advance(1)
                    yield request
        finally:
            engine.rule = before

    def _note(self, one: Continuation, start: int) -> None:
        """What was drafted at each new token."""
        tree, kept = one.last_tree, self._drafted.setdefault(one, [])
        nodes = [0, *one.last_path][: len(one.token_ids) - start]
        kept += [Drafted.after(tree, node) if tree is not None else None for node in nodes]

    def _laws(self, one: Continuation) -> Iterator[tuple[int, Float[np.ndarray, " v"], Float[np.ndarray, " v"] | None]]:
        """Each output token with the target's law at its prefix, from one later forward, and what was drafted there."""
        ids, first = one.token_ids, one.num_prompt - 1
        logits = all_logits(self.llm.target, ids[:-1])[first:]
        chain = TreeBatch.chains([ids[first:-1]])[0]
        processors = prefix_processors(one.sampling, one.num_prompt, set(one.eos_ids), [])
        law = TargetLaw(logits, one.sampling, chain, ids[: one.num_prompt], processors)
        for i, (token, drafted) in enumerate(zip(ids[one.num_prompt :], self._drafted[one], strict=True)):
            row = law.row(i).double().numpy()
            yield token, row, drafted.over(len(row)) if drafted is not None else None


def _stand_in(drafter: str) -> Any:
    """A policy that takes the likeliest tokens as a drafter with a tree of its own takes what it found."""
    options: dict[str, Any] = {}
    if DRAFTERS[drafter].chains_only:
        options["paths"] = [[0] * depth for depth in range(1, max(SIZES.values()) + 1)]
    return GROWERS["static"].grower(**options)


def enumerated_error(grower: Any, rule: AcceptanceRule, size: int, nodes: int, temperature: float) -> float:
    """Largest difference between the joint law of what a rule emits on a grower's trees, completed by the target, and the
    target's own, over two draft and two target laws of the whole prefix."""
    worst, length = 0.0, min(nodes, _DEPTH) + 1
    drafts = [random_law(size, 1), random_law(size, 2, zeros=0.3, concentration=0.6)]
    targets = [random_law(size, 3), random_law(size, 4, zeros=0.3)]
    for draft in drafts:
        trees = tree_law(grower, draft, size, Budget(nodes, min(nodes, _DEPTH)), temperature, _PREFIX)
        for target in targets:
            law = joint_law(trees, rule, target, size, length, temperature, _PREFIX)
            worst = max(worst, float(np.abs(law - target_joint(target, size, length, temperature, _PREFIX)).max()))
    return worst
