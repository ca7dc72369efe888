"""``foredraft audit``: tests whether a configuration is lossless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from foredraft.cli.options import (
    DRAFT,
    AsJson,
    Budget,
    Config,
    Device,
    DraftModel,
    Dtype,
    Force,
    Method,
    Model,
    Raw,
    Rule,
    Seed,
    ShareOfMass,
    Tree,
    option,
)
from foredraft.core.errors import UserError, whole_number


class AuditOptions(NamedTuple):
    """What is audited, and how long."""

    model: Model = None
    dtype: Dtype = "auto"
    device: Device = None
    method: Method = None
    draft_model: DraftModel = None
    tree: Tree = None
    budget: Budget = "8"
    rule: Rule = None
    epsilon: Annotated[float | None, option(DRAFT, "Epsilon of the rules tolerance and uno.")] = None
    speculative_config: Config = None
    force: Force = False
    temperature: Annotated[float, typer.Option(help="Temperature of the sampled tests; 0 skips them.")] = 1.0
    top_p: ShareOfMass = 1.0
    prompts: Annotated[Path | None, option(None, "A .jsonl or .txt file; default: the bundled prompts.")] = None
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts.")] = 40
    samples: Annotated[int, typer.Option(min=1, help="Sampled outputs per prompt.")] = 4
    max_tokens: Annotated[int, typer.Option(min=2, help="Maximum tokens per output.")] = 96
    seed: Seed = 0
    raw: Raw = False

    def config(self) -> dict[str, Any]:
        """Returns the speculative config, checked together with the sampling parameters.

        Raises:
            ValueError: a value is out of range, or names cannot be combined.
        """
        from foredraft.cli import choices
        from foredraft.plan.config import with_usual_tree

        named = (self.method, self.draft_model, self.tree, self.budget, self.rule)
        config = choices.speculative_config(self.model, *named, extra=self.speculative_config, force=self.force) or {}
        config = with_usual_tree({**config, **choices.given(epsilon=self.epsilon)})
        choices.check(self.model, config, {**self.sampling, "seed": self.seed})
        return config

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `SamplingParams`."""
        return {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}


def audit(
    *,
    options: AuditOptions,
    output: Annotated[Path | None, option(None, "Directory for audit.json and audit.md.")] = None,
    as_json: AsJson = False,
) -> int:
    """Test whether a configuration is lossless. The exit code is 0 if it is, else 1.

    The audit enumerates the rule on small vocabularies. It compares greedy output with plain decoding, and sampled output with
    the target's distribution. Finally it plants a bias, which the tests must find.
    """
    config = options.config()
    from foredraft.audit.report import as_dict, markdown
    from foredraft.cli import show

    found = _prepared(options, config).run()
    report = as_dict(found)
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "audit.json").write_text(json.dumps(report, indent=1) + "\n")
            (output / "audit.md").write_text(markdown(found), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write to {str(output)!r} ({error.strerror})", "choose another --output directory"
            ) from None
    if as_json:
        print(json.dumps(report))
    else:
        show.say(markdown(found))
    return 0 if found.is_lossless else 1


def _prepared(options: AuditOptions, config: dict[str, Any]) -> Any:
    """Loads the models and the prompts, and returns an `Auditor`.

    Raises:
        ValueError: a model, the prompts or a parameter cannot be used.
    """
    from foredraft.audit.run import Auditor
    from foredraft.bench import tasks
    from foredraft.bench.calibrate import PROMPTS
    from foredraft.core.params import SamplingParams
    from foredraft.engine.options import MAX_NUM_SEQS
    from foredraft.llm import LLM

    read = tasks.read_prompts(options.prompts or PROMPTS, options.limit)
    whole_number("--samples", options.samples, 1, MAX_NUM_SEQS, "they are decoded at once")
    llm = LLM(
        options.model, config, dtype=options.dtype, device=options.device, max_num_seqs=options.samples, seed=options.seed
    )
    raw = options.raw or llm.tokenizer is None or not getattr(llm.tokenizer, "chat_template", None)
    prompts = tasks.encode_fitting(llm, read, options.max_tokens, raw=raw)
    return Auditor(llm, prompts, SamplingParams(**options.sampling), options.samples)
