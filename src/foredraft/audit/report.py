"""The report of an audit, as a JSON object and in Markdown."""

from __future__ import annotations

from typing import Any

from foredraft.audit.hypotheses import FALSE_ALARM, POWER, Evidence
from foredraft.audit.planted import PLANTED
from foredraft.audit.run import TOLERANCE, Audit
from foredraft.plan.store import versions


def as_dict(audit: Audit) -> dict[str, Any]:
    """Returns the audit as a JSON object."""
    faults = [part for part in audit.divergences if not part.is_tie]
    return {
        "lossless": audit.is_lossless,
        "reasons": audit.reasons,
        "setting": {**audit.setting, **versions()},
        "guarantee": audit.guarantee,
        "enumerated_error": audit.enumerated_error,
        "greedy": {
            "outputs": audit.num_greedy,
            "tokens": audit.num_greedy_tokens,
            "float_ties": len(audit.divergences) - len(faults),
            "faults": len(faults),
            "divergences": [{**vars(part), "is_tie": part.is_tie} for part in audit.divergences],
        },
        "sampled": _evidence(audit.sampled),
        "control": _evidence(audit.control),
        "tv_bound_mean": audit.tv_bound_mean,
        "tv_bound_max": audit.tv_bound_max,
        "false_alarm": FALSE_ALARM,
        "power": POWER,
        "seconds": {name: round(value, 2) for name, value in audit.seconds.items()},
    }


def _evidence(evidence: Evidence | None) -> dict[str, Any] | None:
    if evidence is None:
        return None
    return {
        "tokens": evidence.num_tokens,
        "impossible": evidence.impossible,
        "deviates": evidence.deviates,
        "tests": [{**test._asdict(), "deviates": test.deviates} for test in evidence.tests()],
        "measured_drift": evidence.drift_measured,
        "detectable_bias": evidence.detectable,
    }


def markdown(audit: Audit) -> str:
    """Returns the report in Markdown. The verdict comes first."""
    lossy = audit.guarantee.startswith("lossy")
    verdict = "lossless within the stated power" if audit.is_lossless else "LOSSY" if lossy else "NOT lossless"
    setting = ", ".join(f"{key} {value}" for key, value in audit.setting.items() if value is not None)
    lines = [f"# Audit: {verdict}", ""]
    lines += [f"- {reason}" for reason in audit.reasons] + ([""] if audit.reasons else [])
    lines += [f"{setting}; the rule's claim: {audit.guarantee}.", ""]
    ties = sum(part.is_tie for part in audit.divergences)
    lines += [
        "## Theory and algorithm",
        "",
        f"Every branch of drafting and verification on small vocabularies: largest error {audit.enumerated_error:.3g} "
        f"(lossless below {TOLERANCE:g}).",
        "",
        "## Greedy",
        "",
        f"{audit.num_greedy} outputs, {audit.num_greedy_tokens} tokens, beside plain decoding: "
        f"{audit.num_greedy - len(audit.divergences)} identical, {ties} part at a float tie, "
        f"{len(audit.divergences) - ties} elsewhere.",
        "",
    ]
    lines += [
        f"- token {part.position}: {part.plain_token} (plain) or {part.drafted_token}, margin {part.margin:.4g}, "
        f"rounding {part.rounding:.4g}: {'float tie' if part.is_tie else 'fault'}"
        for part in audit.divergences
    ]
    for name, evidence in (("Sampled", audit.sampled), (f"Negative control: acceptance raised by {PLANTED:g}", audit.control)):
        lines += _section(name, evidence) if evidence is not None else []
    if lossy:
        lines += [
            "",
            f"The rule's own bound of a token's distance: {audit.tv_bound_mean:.4g}, at most {audit.tv_bound_max:.4g}.",
        ]
    lines += ["", "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in audit.seconds.items()) + ".", ""]
    return "\n".join(lines)


def _section(name: str, evidence: Evidence) -> list[str]:
    lines = ["", f"## {name}", "", f"{evidence.num_tokens} tokens against the target's law at their own prefixes.", ""]
    lines += ["| test | statistic | p-value | threshold (Holm) | |", "|---|---|---|---|---|"]
    for test in evidence.tests():
        result = "deviates" if test.deviates else "as expected"
        threshold = f"{test.threshold:.3g}" if test.threshold else "not reached"
        lines.append(f"| {test.name} | {test.statistic:.3f} | {test.p_value:.3g} | {threshold} | {result} |")
    if evidence.impossible:
        lines += ["", f"{evidence.impossible} tokens have probability 0 under the target."]
    lines += [
        "",
        f"False-alarm rate of all tests together {FALSE_ALARM:g}. A bias of {evidence.detectable:.4f} (total variation, "
        f"towards the drafter) would have been found with probability {POWER:g}; measured: {evidence.drift_measured:.4f}.",
    ]
    return lines
