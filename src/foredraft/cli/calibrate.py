"""``foredraft calibrate``: measures a drafter, and shows what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from foredraft.cli.options import AsJson, Device, DraftModel, Dtype, Limit, Model, Plot, option


class CalibrateOptions(NamedTuple):
    """What is measured, and on which prompts; the fields are those of `CalibrateChoice`."""

    model: Model = None
    method: Annotated[str | None, option(None, "Drafter; default: lm, or the method of the head in --draft-model.")] = None
    draft_model: DraftModel = None
    prompts: Annotated[Path | None, option(None, "Training prompts; default: the bundled prompts.")] = None
    limit: Limit = None
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 128
    dtype: Dtype = "auto"
    device: Device = None


def calibrate(*, options: CalibrateOptions, plot: Plot = None, as_json: AsJson = False) -> None:
    """Measure a drafter: acceptance by rank and depth, tokens per step of every tree, and time per step on this machine.

    Acceptance and tokens per step are stored with the drafter, or in the user's cache.
    They improve the automatic choice of tree and size.
    """
    from foredraft.cli import choices

    drafting = choices.given(method=options.method, model=options.draft_model)
    choices.check(options.model, drafting or None, {"max_tokens": options.max_tokens})
    from foredraft.bench import calibrate, costs
    from foredraft.cli import show
    from foredraft.core.params import SamplingParams
    from foredraft.llm import LLM
    from foredraft.plan.measure import sample_prompt
    from foredraft.plan.speculation import KINDS

    choice = calibrate.CalibrateChoice(**{**options._asdict(), "prompts": options.prompts or calibrate.PROMPTS})
    file, found = calibrate.calibrate(choice)
    llm = LLM(choice.model, choice.config, dtype=choice.dtype, device=choice.device, max_num_seqs=1)
    drafter: Any = llm.with_speculation({**choice.config, "num_speculative_tokens": 1}).engine.drafter
    models = {"target": llm.target, "drafter": getattr(drafter, "model", None)}
    prompt = sample_prompt(llm.tokenizer, llm.target.vocab_size, llm.max_model_len)
    seconds = {name: costs.cost_curve(model, prompt) for name, model in models.items() if model is not None}
    chosen = {kind: llm.drafting(SamplingParams(temperature=t)) for kind, t in KINDS.items()}
    if as_json:
        print(json.dumps({**found, "seconds": seconds, "chosen": chosen, "file": str(file)}))
    else:
        _show(found, seconds, chosen)
        show.say(f"acceptance and tokens per step are in {file}")
    if plot is not None:
        costs.plot(found, seconds, plot)


def _show(found: dict[str, Any], seconds: dict[str, dict[str, float]], chosen: dict[str, Any]) -> None:
    from foredraft.bench.calibrate import SIZES
    from foredraft.bench.costs import COST_SIZES
    from foredraft.cli import show

    for kind, curves in found["tokens_per_step"].items():
        rows = [
            (tree, *(f"{curve[str(size)]:.2f}" if str(size) in curve else "" for size in SIZES))
            for tree, curve in curves.items()
        ]
        show.print_table(f"tokens per step, {kind}", ("tree", *(f"{size} nodes" for size in SIZES)), rows)
    rows = [(name, *(f"{1000 * value:.2f}" for value in curve.values())) for name, curve in seconds.items()]
    show.print_table("milliseconds of a forward pass, by number of tokens", ("model", *map(str, COST_SIZES)), rows)
    for kind, way in chosen.items():
        nodes = f"{way['tree'] or way['method']}, {way['budget']} nodes, rule {way['rule']}"
        show.say(f"chosen for {kind} requests, one at a time: {nodes if way['budget'] else 'plain decoding'}")
