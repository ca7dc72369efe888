"""Measures, on training text, how probable it is that the k-th child of a node is the accepted one; Sequoia's trees need it.

    python recipes/measure_acceptance.py --data ../shared/data/train --drafter src/foredraft/bundled/draft-lm

At every position of the target's own continuations of training prompts, the drafter's law gives `RANKS` children and the rule
that verifies such trees says which of them, if any, is accepted. Two vectors are written to ``acceptance.json`` in its
directory: ``sampled`` (children drawn without replacement, texts at temperature 1) and ``greedy`` (the likeliest children,
texts at temperature 0).

Source: Sequoia (arXiv 2402.12374), section 4.1, the acceptance vector.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import torch

from foredraft.cache import prefill
from foredraft.draws import Draws
from foredraft.grow.base import GREEDY_DRAFT_TEMPERATURE
from foredraft.llm import BUNDLED_DRAFTER, BUNDLED_TARGET, LLM
from foredraft.models.loading import load_target
from foredraft.progress import progress_bar
from foredraft.protocols import Target
from foredraft.sampling import SamplingParams, TargetLaw, warp
from foredraft.tree import DraftTree, Drawn
from foredraft.verify import RULES

RANKS = 32


def read_prompts(data: Path, count: int, seed: int) -> list[str]:
    """Questions of GSM8K's training part and instructions of Dolly, half and half."""
    prompts = []
    for name, key in (("gsm8k_train.jsonl.gz", "question"), ("dolly_15k.jsonl.gz", "instruction")):
        with gzip.open(data / name, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line)[key] for line in lines]
        prompts += [rows[i] for i in np.random.default_rng(seed).choice(len(rows), count // 2, replace=False)]
    return prompts


def all_logits(model: Target, token_ids: list[int]) -> torch.Tensor:
    """Logits after every token of a text."""
    pool = model.new_pool(1, len(token_ids))
    [chunks] = prefill(model, pool, [pool.allocate()], [token_ids], scored=True)
    return torch.cat(chunks).float()


def accepted_rank(target: torch.Tensor, draft: torch.Tensor, sampling: SamplingParams, draws: Draws) -> int | None:
    """Which child of one node is accepted: None, or its rank."""
    temperature = sampling.temperature or GREEDY_DRAFT_TEMPERATURE
    law = warp(draft[None], SamplingParams(temperature=temperature))
    if sampling.temperature:
        tokens, drawn = draws.order(law[0], ("draft", (), 0), RANKS), Drawn.WITHOUT_REPLACEMENT
    else:
        tokens, drawn = law[0].topk(RANKS).indices.tolist(), Drawn.DETERMINISTIC
    size = len(tokens) + 1
    row = np.full(size, -1)
    row[0] = 0 if drawn else -1
    parents = np.array([-1] + [0] * len(tokens))
    tree = DraftTree(np.array([0, *tokens]), parents, np.full(size, int(drawn)), row, law)
    target_law = TargetLaw(target.expand(size, -1), sampling)
    path = RULES["multiround"].rule(tree, target_law, draws).path
    return path[0] - 1 if path else None


def measure(llm: LLM, drafter: Target, prompts: list[str], temperature: float, max_tokens: int) -> list[float]:
    """The acceptance vector at one temperature."""
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    counts, positions = np.zeros(RANKS), 0
    with progress_bar(f"temperature {temperature:g}", len(prompts)) as advance:
        for number, result in enumerate(llm.chat(conversations, sampling)):
            ids = result.prompt_token_ids + result.outputs[0].token_ids
            scores = [all_logits(model, ids[:-1]) for model in (llm.target, drafter)]
            for place in range(len(result.prompt_token_ids) - 1, len(ids) - 1):
                rank = accepted_rank(scores[0][place], scores[1][place], sampling, Draws(number).at(place))
                positions += 1
                if rank is not None:
                    counts[rank] += 1
            advance(1)
    return [round(float(count) / positions, 5) for count in counts]


def write_acceptance(
    model: Path, drafter: Path, data: Path, *, num_prompts: int = 120, max_tokens: int = 96, seed: int = 0
) -> None:
    """Measures both vectors and writes them to the drafter's directory."""
    llm = LLM(model, {"method": "ar"}, max_model_len=1024, max_num_seqs=16)
    draft_model = load_target(drafter)
    prompts = [p for p in read_prompts(data, num_prompts, seed) if len(p) < 1500]
    vectors = {
        name: measure(llm, draft_model, prompts, temperature, max_tokens)
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0))
    }
    out = drafter / "acceptance.json"
    out.write_text(json.dumps(vectors, indent=1) + "\n")
    for name, vector in vectors.items():
        print(f"{name}: {' '.join(f'{p:.3f}' for p in vector[:8])} ... sum {sum(vector):.3f}")
    print(f"written to {out}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=BUNDLED_TARGET)
    parser.add_argument("--drafter", type=Path, default=BUNDLED_DRAFTER)
    parser.add_argument("--data", type=Path, required=True, help="folder of training text")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_acceptance(args.model, args.drafter, args.data, num_prompts=args.prompts, max_tokens=args.max_tokens, seed=args.seed)


if __name__ == "__main__":
    main()
