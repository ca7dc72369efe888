"""Peak memory of a step with a large tree and a large vocabulary, against the logits that the target gives for the tree.

    python benchmarks/memory.py --output benchmarks/memory.jsonl

Target and drafter are one small random Llama with the vocabulary of Llama 3, whose laws are as sharp as those of a language
model (logits of standard deviation 4: 3.8 nats). That the drafter agrees with the target makes the accepted paths longest, so
most laws are needed. Memory is what is held above the state after a small step: in the first step of a request, and in a later
one, where what the step before left is held too. The peak grows along the step: until the target's forward begins, until it
ends, until the step ends; all are given in units of the logits. The aim is a peak below twice the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from measuring import LAWS, arguments, drafting, held_bytes, report, rounded
from transformers import LlamaConfig, LlamaForCausalLM

from foredraft import LLM
from foredraft.bench.run import forget_peak, peak_bytes
from foredraft.models.loading import parse_dtype
from foredraft.progress import progress_bar

LOGITS_STD = 4.0
PROMPT = list(range(100, 116))
SMALL = 16

PEAKS = ("before_step", "until_forward", "after_forward", "after_step")
COLUMNS = ("tree", "nodes", "sampling", "step", "drafted", "accepted", "logits_dtype", "logits_mib", *PEAKS, "below_twice")


def random_llama(vocab: int, dtype: torch.dtype | None, device: str | None) -> LlamaForCausalLM:
    """A model of two layers whose laws are as sharp as `LOGITS_STD` makes them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=LOGITS_STD / config.hidden_size**0.5)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(place, dtype)  # type: ignore[arg-type]


@contextmanager
def watched(target: Any, found: dict[str, Any]) -> Iterator[None]:
    """Notes the peaks before and after the forwards that score a tree, and the logits they give."""
    forward: Callable[..., Any] = target.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        before = peak_bytes(target.device)
        scores = forward(*args, **kwargs)
        if len(scores.logits):
            found.update(until_forward=before, after_forward=peak_bytes(target.device))
            found.update(logits_bytes=scores.logits.nbytes, logits_dtype=str(scores.logits.dtype).removeprefix("torch."))
        return scores

    target.forward = run
    try:
        yield
    finally:
        del target.forward


def measure(llm: LLM, law: str, num_steps: int) -> Iterator[dict[str, Any]]:
    """What the first steps of a request hold above what was held before it."""
    device = llm.target.device
    base = held_bytes(device)
    request = llm.engine.add(None, PROMPT, replace(LAWS[law], ignore_eos=True, seed=0))
    running = llm.engine.run([request])
    for number in range(num_steps):
        forget_peak(device)
        found: dict[str, Any] = {"before_step": peak_bytes(device)}
        with watched(llm.target, found):
            next(running)
        found["after_step"] = peak_bytes(device)
        record = request.continuations[0].records[-1]
        shares = {name: max(0, found[name] - base) / found["logits_bytes"] for name in PEAKS}
        yield rounded(
            {
                "step": "first" if number == 0 else "later",
                "drafted": record.num_draft_tokens,
                "accepted": record.num_accepted_tokens,
                "logits_dtype": found["logits_dtype"],
                "logits_mib": found["logits_bytes"] / 2**20,
                "held_before_mib": base / 2**20,
                "peak_mib": (found["after_step"] - base) / 2**20,
                **shares,
                "below_twice": shares["after_step"] < 2,
            }
        )
    running.close()  # type: ignore[attr-defined]


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, models=False)
    parser.add_argument("--nodes", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--trees", nargs="+", default=["dyspec", "topk"])
    args = parser.parse_args()
    model = random_llama(args.vocab, parse_dtype(args.dtype), args.device)
    plain = LLM(model, {"method": "ar"}, max_num_seqs=1)
    rows = []
    plan = [(tree, law) for tree in args.trees for law in ("0", "1", "1, top_p 0.9")]
    with progress_bar("measuring", len(plan)) as advance:
        for tree, law in plan:
            list(measure(plain.with_speculation(drafting(model, tree, SMALL)), law, 1))  # warm-up
            llm = plain.with_speculation(drafting(model, tree, args.nodes))
            setting = {"tree": tree, "nodes": args.nodes, "vocab": args.vocab, "sampling": law}
            rows += [{**setting, **row} for row in measure(llm, law, 2)]
            advance(1)
    report(args.output, rows, COLUMNS, device=plain.target.device, dtype=args.dtype)
    print("Held before the step, and peaks until and after the target's forward and after the step, in units of the logits.")


if __name__ == "__main__":
    main()
