"""Runs an audit: enumerates small vocabularies, compares greedy output with plain decoding, and tests sampled output against
the target's law. The negative control repeats these tests with a planted bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from foredraft.audit.exact import enumerated_error
from foredraft.audit.greedy import Divergence, divergence
from foredraft.audit.hypotheses import Evidence
from foredraft.audit.planted import Eager
from foredraft.bench.calibrate import all_logits
from foredraft.core.contracts import AcceptanceRule
from foredraft.core.draws import Draws
from foredraft.core.errors import UserError
from foredraft.core.law import TargetLaw
from foredraft.core.outputs import require_whole
from foredraft.core.params import SamplingParams
from foredraft.core.processors import prefix_processors
from foredraft.core.progress import progress_bar
from foredraft.core.tree import DraftTree, Ids, TreeBatch
from foredraft.drafters import DRAFTERS
from foredraft.engine.request import Request
from foredraft.engine.request import Sequence as Output
from foredraft.llm import LLM
from foredraft.plan.speculation import PLAIN
from foredraft.rules import RULES
from foredraft.trees import GROWERS

TOLERANCE = 1e-12
"""Largest error of an enumerated law that counts as rounding."""

SIZES: Mapping[int, int] = {2: 4, 3: 3}
"""Size of the vocabulary -> number of nodes of the largest enumerated trees."""


class Drafted(NamedTuple):
    """The draft law after a node, as the tokens of positive probability. Children that were not sampled have probability 1."""

    token_ids: Ids
    probs: Float[np.ndarray, " n"]

    @classmethod
    def after(cls, tree: DraftTree, node: int) -> Drafted | None:
        """Returns the draft law after one node, or None for a leaf. It is known before the tokens, so a test may use it."""
        law, children = tree.law(node), tree.children[node]
        if law is None:
            return cls(tree.tokens[children], np.ones(len(children))) if children else None
        token_ids = law.nonzero()[:, 0]
        return cls(token_ids.cpu().numpy(), law[token_ids].double().cpu().numpy())

    def over(self, vocab_size: int) -> Float[np.ndarray, " v"]:
        """Returns the law with an entry for every token."""
        probs = np.zeros(vocab_size)
        probs[self.token_ids] = self.probs
        return probs


@dataclass
class Audit:
    """Result of an audit.

    Attributes:
        setting: model, drafter, tree, rule, sampling parameters, dtype and versions.
        guarantee: guarantee of the rule.
        enumerated_error: largest difference between the law of the output and the target's law, over all enumerated cases.
        num_greedy, num_greedy_tokens: number of greedy outputs that were compared, and of their tokens.
        divergences: differences of greedy outputs from plain decoding.
        sampled: tests of sampled output. None at temperature 0.
        control: the same tests with a planted bias. None at temperature 0 and for a lossy rule.
        tv_bound_mean, tv_bound_max: the rule's own bounds on the total variation distance of a token.
        seconds: duration of each part in seconds.
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
        """Reasons why the output is not lossless within the stated power. Empty if it is."""
        reasons = []
        if self.guarantee.startswith("lossy"):
            reasons.append(f"the rule is {self.guarantee}")
        if self.enumerated_error > TOLERANCE:
            reasons.append(f"the enumerated law differs from the target's by {self.enumerated_error:.3g}")
        faults = [part for part in self.divergences if not part.is_tie]
        if faults:
            first = faults[0]
            reasons.append(
                f"{len(faults)} greedy outputs differ from plain decoding by more than rounding, the first at token "
                f"{first.position} with a margin of {first.margin:.4g} (rounding {first.rounding:.4g})"
            )
        if self.sampled is not None and self.sampled.impossible:
            reasons.append(f"{self.sampled.impossible} sampled tokens have probability 0 under the target")
        if self.sampled is not None:
            reasons += [
                f"sampled tokens deviate: {test.name} {test.statistic:.3g}, p = {test.p_value:.2g}"
                for test in self.sampled.tests()
                if test.deviates
            ]
        if self.control is not None and not self.control.deviates:
            reasons.append("the audit lacks power: it did not find the planted bias; give it more prompts, samples or tokens")
        return reasons

    @property
    def is_lossless(self) -> bool:
        """Whether there is no reason against losslessness."""
        return not self.reasons


@dataclass(frozen=True)
class Auditor:
    """Audits one `LLM`.

    Args:
        llm: target, drafter, tree and rule.
        prompts: token ids of the prompts.
        sampling: parameters of the sampled part. Temperature 0 skips this part.
        samples: number of sampled outputs per prompt.
        rule: rule that replaces that of `llm`, for planted faults.
        sizes: size of the vocabulary -> number of nodes of the largest enumerated trees.
        enumerated_error: result of an earlier enumeration of this tree and rule. It does not depend on the models.
    """

    llm: LLM
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    samples: int
    rule: AcceptanceRule | None = None
    sizes: Mapping[int, int] = field(default_factory=lambda: SIZES)
    enumerated_error: float | None = None
    _drafted: dict[Output, list[Drafted | None]] = field(default_factory=dict, init=False, repr=False)

    def run(self) -> Audit:
        """Runs all parts, in order of their cost. Raises `ValueError` if the configuration does not draft."""
        drafting = self.llm.drafting(self.sampling)
        if drafting["method"] == PLAIN or not drafting["budget"]:
            raise UserError(
                "there is nothing to audit: this configuration decodes without drafts", "Choose a method, a tree and a budget"
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
        """Returns the largest error, sampled and greedy, over two draft and two target laws. One of each pair has zeros."""
        speculation, tree = self.llm.speculation, drafting["tree"]
        assert speculation is not None
        grower: Any = speculation.grower(tree, self.llm.measured(speculation)) if tree else _stand_in(drafting["method"])
        if hasattr(grower, "width"):
            grower = replace(grower, width=1)  # a wider pass draws more orders in vain, and each must be visited
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
        outputs = [request.output() for request in self._run(sampling, 1, Draws)]
        for drafted, reference in zip(outputs, wanted, strict=True):
            pair = reference.outputs[0].token_ids, drafted.outputs[0].token_ids
            part = divergence(plain, reference.prompt_token_ids, *pair)
            audit.num_greedy += 1
            audit.num_greedy_tokens += len(pair[1])
            audit.divergences += [part] if part is not None else []
        self._drafted.clear()  # only the tests of sampled tokens need the draft laws

    def _sampled(self, audit: Audit | None, kind: type[Draws]) -> Evidence:
        evidence, rng, bounds = Evidence(), np.random.default_rng(0), []
        for request in self._run(self.sampling, self.samples, kind):
            for sequence, output in zip(request.sequences, request.output().outputs, strict=True):
                bounds.append(output.metrics)
                for token, law, draft in self._laws(sequence):
                    evidence.see(token, law, draft, float(rng.random()))
                self._drafted.pop(sequence, None)
        if audit is not None:
            audit.tv_bound_mean = float(np.mean([metrics.tv_bound_mean for metrics in bounds]))
            audit.tv_bound_max = max(metrics.tv_bound_max for metrics in bounds)
        return evidence

    def _run(self, sampling: SamplingParams, samples: int, kind: type[Draws]) -> Iterator[Any]:
        """Decodes every prompt with the audited rule. Drops a request when the next one starts."""
        engine, rule = self.llm.engine, self.rule
        before = engine.rule
        engine.rule = rule or before
        try:
            with progress_bar("decoding", len(self.prompts)) as advance:
                for number, prompt in enumerate(self.prompts):
                    request = engine.add_request(None, prompt, replace(sampling, n=samples, seed=number))
                    for sequence in request.sequences:
                        sequence.draws = kind(sequence.draws.seed)
                    self._decode(request)
                    advance(1)
                    yield request
        finally:
            engine.rule = before

    def _decode(self, request: Request) -> None:
        """Decodes one request, and records the draft law at each new token."""
        engine, steps = self.llm.engine, dict.fromkeys(request.sequences, 0)
        seen = {sequence: sequence.num_prompt for sequence in request.sequences}
        try:
            while not request.is_finished:
                engine.step()
                for sequence in request.sequences:
                    if len(sequence.records) > steps[sequence]:
                        self._note(sequence, seen[sequence])
                    seen[sequence], steps[sequence] = len(sequence.token_ids), len(sequence.records)
        finally:
            engine.abort_request(request.request_id)

    def _note(self, sequence: Output, start: int) -> None:
        """Records the draft law at each new token of a step."""
        tree, kept = sequence.last_tree, self._drafted.setdefault(sequence, [])
        nodes = [0, *sequence.last_path][: len(sequence.token_ids) - start]
        kept += [Drafted.after(tree, node) if tree is not None else None for node in nodes]

    def _laws(self, output: Output) -> Iterator[tuple[int, Float[np.ndarray, " v"], Float[np.ndarray, " v"] | None]]:
        """Yields each output token with the target's law at its prefix, from one later forward, and the draft law there."""
        ids, first, sampling = output.token_ids, output.num_prompt - 1, output.sampling
        logits = all_logits(self.llm.target, ids[:-1])[first:]
        chain = TreeBatch.chains([ids[first:-1]])[0]
        processors = prefix_processors(sampling, output.num_prompt, set(output.eos_ids), [])
        law = TargetLaw(logits, sampling, chain, ids[: output.num_prompt], processors)
        for i, (token, drafted) in enumerate(zip(ids[output.num_prompt :], self._drafted[output], strict=True)):
            row = law.row(i).double().numpy()
            yield token, row, drafted.over(len(row)) if drafted is not None else None


def _stand_in(drafter: str) -> Any:
    """Returns a policy that stands in for a drafter with its own trees. It takes the most likely tokens."""
    options: dict[str, Any] = {}
    if DRAFTERS[drafter].chains_only:
        options["paths"] = [[0] * depth for depth in range(1, max(SIZES.values()) + 1)]
    return GROWERS["static"].grower(**options)
