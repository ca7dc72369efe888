"""Measures the acceptance of a drafter on prompts of training sets.

The acceptance by sibling rank and by depth, and the tokens per step of each tree and size, do not depend on the machine. They
are written to ``calibration.json`` in the drafter's directory, or in the user's cache if the drafter has no directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.bench import tasks
from foredraft.cache.blocks import num_blocks
from foredraft.cache.pool import prefill
from foredraft.core.contracts import Target
from foredraft.core.draws import Draws
from foredraft.core.errors import UserError
from foredraft.core.folders import BUNDLED
from foredraft.core.law import TargetLaw, warp
from foredraft.core.metrics import summarize
from foredraft.core.outputs import require_whole
from foredraft.core.params import SamplingParams
from foredraft.core.progress import progress_bar
from foredraft.core.tree import DraftTree, Drawn
from foredraft.drafters import DRAFTERS
from foredraft.drafters.along import AskedAlong
from foredraft.llm import LLM
from foredraft.plan.choose import TRIED_TREES, TYPICAL_SIZE, best_ways, curve_name, has_weights
from foredraft.plan.config import drafter_alone
from foredraft.plan.speculation import KINDS, Way, trees_of
from foredraft.plan.store import file_beside, file_in_cache
from foredraft.rules import RULES
from foredraft.trees.acceptance import AcceptanceTable, Trial, conditional
from foredraft.trees.base import GREEDY_DRAFT_TEMPERATURE

PROMPTS = BUNDLED / "calibration.jsonl"
"""Default prompts, from training sets. Settings that are tuned on them are thus not tuned on the reported test prompts."""

RANKS = 32
DEPTHS = 8
SIZES = (2, 4, 8, 16, 32, 64)
_GAIN = 1.01
_HOPELESS = 0.9
"""A method needs, at a typical size, this share of the best method's tokens per step, or larger trees are not measured.

Larger trees take most of the time, and `auto` would not choose such a method.
"""


@dataclass(frozen=True)
class CalibrateChoice:
    """The options of ``foredraft calibrate``; see its ``--help``."""

    model: str | None = None
    method: str | None = None
    draft_model: str | None = None
    prompts: Path = PROMPTS
    limit: int | None = None
    max_tokens: int = 128
    dtype: str = "auto"
    device: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Speculative config to measure. For a drafter that first looks up, it names the drafter that it falls back to."""
        return drafter_alone(self.draft_model, self.method)


def calibrate(choice: CalibrateChoice) -> tuple[Path, dict[str, Any]]:
    """Measures acceptance and tokens per step, and writes them to a file.

    Returns:
        The file, and its content.

    Raises:
        ValueError: the model, the drafter or the prompts cannot be read, no prompt fits, or the file cannot be written.
    """
    config = choice.config
    read = tasks.read_prompts(choice.prompts, choice.limit)
    plain = LLM(choice.model, {"method": "ar"}, dtype=choice.dtype, device=choice.device, max_num_seqs=8)
    drafting = plain.with_speculation({**config, "num_speculative_tokens": 1})
    prompts = tasks.encode_fitting(plain, read, choice.max_tokens, raw=False)
    found: dict[str, Any] = {"prompts": choice.prompts.name, "num_prompts": len(prompts), "max_tokens": choice.max_tokens}
    weights = drafting.plan.weights if drafting.plan else None
    found |= {"weights": weights} if weights else {}
    file = file_beside(choice.draft_model) or file_in_cache(weights, plain.target, config["method"])
    if file is None:
        raise UserError(
            "the calibration cannot be saved: no cache folder is writable", "Set FOREDRAFT_CACHE to a writable folder"
        )
    if DRAFTERS[config["method"]].gives == "expand":
        kinds = {kind: SamplingParams(temperature=t, max_tokens=choice.max_tokens) for kind, t in KINDS.items()}
        trials = {kind: all_trials(plain, drafting, prompts, sampling) for kind, sampling in kinds.items()}
        found["acceptance_by_depth"] = {kind: by_depth(accepted_ranks(texts)) for kind, texts in trials.items()}
        found["acceptance"] = {kind: rows[0] for kind, rows in found["acceptance_by_depth"].items()}
        found["acceptance_by_prob"] = {kind: table_of(texts).written() for kind, texts in trials.items()}
        write(file, found)  # the trees `sequoia` and `dyspec-calibrated` read it
    found |= tokens_per_step(plain, config, prompts, choice.max_tokens)
    write(file, found)
    return file, found


def write(file: Path, found: dict[str, Any]) -> None:
    """Writes a calibration as JSON.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {str(file)!r} ({error.strerror})", "copy the drafter to a writable directory") from None


def tokens_per_step(plain: LLM, config: dict[str, Any], prompts: Sequence[list[int]], max_tokens: int) -> dict[str, Any]:
    """Measures tokens per step by decoding with every tree and size.

    If the drafter has weights, drafters without weights are measured too, for comparison.

    Returns:
        ``tokens_per_step``: kind of request -> drafter and tree -> number of nodes -> acceptance length. ``drafted_share`` has
        the same form. It holds only drafters that first look up, with the best trees.
    """
    method = config["method"]
    own = [Way(method, name) for name in trees_of(DRAFTERS[method])]
    free = [Way(name, None) for name, row in DRAFTERS.items() if row.weights is None]
    asking = [name for name, row in DRAFTERS.items() if row.asks == method]
    ways = [*own, *free] if has_weights(own[0]) else own
    found: dict[str, Any] = {"tokens_per_step": {}, "drafted_share": {}}
    with progress_bar("tokens per step", len(KINDS) * (len(ways) + min(TRIED_TREES + 1, len(own)) * len(asking))) as advance:

        def curves(measured: Sequence[Way], sampling: SamplingParams) -> dict[str, list[Point]]:
            points: dict[str, list[Point]] = {}
            for way in measured:
                best = max((at_most(known, TYPICAL_SIZE).acceptance_length for known in points.values()), default=0.0)
                points[curve_name(way)] = list(curve(plain, config, way, prompts, sampling, best))
                advance(1)
            return points

        for kind, temperature in KINDS.items():
            sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
            pure = curves(ways, sampling)
            best = best_ways({way: at_most(pure[curve_name(way)], TYPICAL_SIZE).acceptance_length for way in own})
            mixed = curves([Way(name, way.tree) for name in asking for way in best], sampling)
            found["tokens_per_step"][kind] = {
                name: {str(point.nodes): point.acceptance_length for point in points} for name, points in (pure | mixed).items()
            }
            found["drafted_share"][kind] = {
                name: {str(point.nodes): point.drafted_share for point in points} for name, points in mixed.items()
            }
    return found


class Point(NamedTuple):
    """Measurement of one tree size.

    Attributes:
        nodes: number of nodes below the root.
        acceptance_length: tokens per step.
        drafted_share: share (0 to 1) of the trees for which a drafter that first looks up fell back to its other drafter; 1 for
            all other drafters.
    """

    nodes: int
    acceptance_length: float
    drafted_share: float


def at_most(points: Sequence[Point], nodes: int) -> Point:
    """Returns the largest measured size up to `nodes`."""
    return max((point for point in points if point.nodes <= nodes), key=lambda point: point.nodes)


def curve(
    plain: LLM, config: dict[str, Any], way: Way, prompts: Sequence[list[int]], sampling: SamplingParams, best: float
) -> Iterator[Point]:
    """Measures growing sizes of a tree. It stops when a larger tree gains nothing, or is far behind the best method.

    Args:
        best: tokens per step of the best method so far, at the typical size.
    """
    before = 0.0
    for nodes in SIZES:
        tree = {"tree": way.tree} if way.tree else {}
        model = {"model": config["model"]} if has_weights(way) and "model" in config else {}
        llm = plain.with_speculation({"method": way.drafter, **model, **tree, "num_speculative_tokens": nodes})
        length = acceptance_length(llm, prompts, sampling)
        drafter: Any = llm.engine.drafter
        share = 1.0
        if DRAFTERS[way.drafter].asks is not None:
            share = round(drafter.num_drafted / (drafter.num_drafted + drafter.num_looked_up), 4)
        yield Point(nodes, length, share)
        if length < _GAIN * before or (nodes >= TYPICAL_SIZE and length < _HOPELESS * best):
            return
        before = length


def acceptance_length(llm: LLM, prompts: Sequence[list[int]], sampling: SamplingParams) -> float:
    """Measures the tokens per step over all prompts."""
    results = llm.generate(list(prompts), sampling)
    require_whole(results)
    records = [record for result in results for output in result.outputs for record in output.records]
    return round(summarize(records).acceptance_length, 4)


def all_trials(plain: LLM, drafting: LLM, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[list[list[Trial]]]:
    """Offers children to the rule at every position of the target's own continuations, and returns the rule's decisions.

    Returns:
        For each prompt and position, the trials of `offer_children`.
    """
    drafter, found = AskedAlong(plain.target, drafting.drafter_grown_by), []
    with progress_bar(f"acceptance, temperature {sampling.temperature:g}", len(prompts)) as advance:
        for number, result in enumerate(plain.generate(list(prompts), sampling)):
            ids = result.prompt_token_ids + result.outputs[0].token_ids
            places = range(len(result.prompt_token_ids) - 1, len(ids) - 1)
            draws = [Draws(number).at(place) for place in places]
            rows = zip(*drafter.logits(ids[:-1], places.start), draws, strict=True)
            found.append([offer_children(target, draft, sampling, draw) for target, draft, draw in rows])
            advance(1)
    return found


def accepted_ranks(texts: Sequence[Sequence[Sequence[Trial]]]) -> list[list[int]]:
    """Returns the rank of the accepted child at every position; -1 if none is accepted."""
    return [[trials[-1].rank if trials and trials[-1].accepted else -1 for trials in text] for text in texts]


def table_of(texts: Sequence[Sequence[Sequence[Trial]]]) -> AcceptanceTable:
    """Computes the acceptance by rank and draft probability, over all positions."""
    return AcceptanceTable.measured([trial for text in texts for trials in text for trial in trials])


def by_depth(ranks: Sequence[Sequence[int]]) -> list[list[float]]:
    """Computes the share of each accepted rank at depth 1, 2, ...

    Depth d counts only the positions before which d - 1 children in a row were accepted.
    """
    rows = []
    for depth in range(DEPTHS):
        at = [text[i] for text in ranks for i in range(depth, len(text)) if all(rank >= 0 for rank in text[i - depth : i])]
        counts = np.bincount([rank for rank in at if rank >= 0], minlength=RANKS)
        rows.append([round(float(count) / max(len(at), 1), 5) for count in counts])
    return rows


def all_logits(model: Target, token_ids: Sequence[int]) -> Float[Tensor, "n v"]:
    """Computes the logits after every token of a text, in float32."""
    pool = model.new_pool(num_blocks(len(token_ids)))
    [chunks] = prefill(model, [pool.allocate()], [token_ids], scored=True)
    return torch.cat([scores.logits for scores in chunks]).float()


def offer_children(
    target: Float[Tensor, " v"], draft: Float[Tensor, " v"], sampling: SamplingParams, draws: Draws
) -> list[Trial]:
    """Offers up to `RANKS` children of one node to the multi-round rule.

    Args:
        target: the target's logits at the node.
        draft: the drafter's logits at the node.

    Returns:
        The children that the rule tests, in order. An accepted child is the last one.

    Source: Sequoia (arXiv 2402.12374), section 4.1, the acceptance vector.
    """
    law = warp(draft[None], SamplingParams(temperature=sampling.temperature or GREEDY_DRAFT_TEMPERATURE))
    if sampling.temperature:
        tokens, drawn = draws.order(law[0], ("draft", (), 0), RANKS), Drawn.WITHOUT_REPLACEMENT
    else:
        tokens, drawn = law[0].topk(min(RANKS, law.shape[1])).indices.tolist(), Drawn.DETERMINISTIC
    size = len(tokens) + 1
    row = np.full(size, -1)
    row[0] = 0 if drawn else -1
    tree = DraftTree(np.array([0, *tokens]), np.array([-1] + [0] * len(tokens)), np.full(size, int(drawn)), row, law)
    path = RULES["multiround"].rule(tree, TargetLaw(target.expand(size, -1), sampling), draws).path
    tested = path[0] if path else len(tokens)
    probs = conditional(law[0][tokens].double().numpy())[:tested].tolist()
    return [Trial(rank, prob, bool(path) and rank == tested - 1) for rank, prob in enumerate(probs)]
