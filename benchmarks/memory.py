"""Measures the peak memory of a step with a large tree and a large vocabulary, relative to the target's logits for the tree.

    python benchmarks/memory.py --output benchmarks/results/memory.jsonl

Target and drafter are one small random Llama with the vocabulary of Llama 3. Its distributions are as sharp as those of a
language model (logits with standard deviation 4: 3.8 nats). Since the drafter agrees with the target, the accepted paths are
longest and most distributions are needed.

The memory is measured above the state after a small step. It is measured in the first step of a request and in a later step,
which also holds the remains of the step before. The peak is recorded up to the start of the target's forward pass, up to its
end, and up to the end of the step. All peaks are in units of the logits' size. The aim is a peak below twice the logits.
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
from foredraft.core.progress import progress_bar
from foredraft.models.loading import parse_dtype

LOGITS_STD = 4.0
PROMPT = list(range(100, 116))
SMALL = 16

PEAKS = ("before_step", "until_forward", "after_forward", "after_step")
COLUMNS = ("tree", "nodes", "sampling", "step", "drafted", "accepted", "logits_dtype", "logits_mib", *PEAKS, "below_twice")


def random_llama(vocab: int, dtype: torch.dtype | None, device: str | None) -> LlamaForCausalLM:
    """Makes a random model of two layers whose logits have the standard deviation `LOGITS_STD`."""
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
    """Records the peaks before and after the forward passes that score a tree, and the size of their logits."""
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
    """Measures the memory of the first steps of a request, above the memory before it."""
    device = llm.target.device
    base = held_bytes(device)
    request = llm.engine.add_request(None, PROMPT, replace(LAWS[law], ignore_eos=True, seed=0))
    llm.engine.step()  # the prompt
    for number in range(num_steps):
        forget_peak(device)
        found: dict[str, Any] = {"before_step": peak_bytes(device)}
        with watched(llm.target, found):
            llm.engine.step()
        found["after_step"] = peak_bytes(device)
        record = request.sequences[0].records[-1]
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
    llm.engine.abort_request(request.request_id)


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, models=False)
    parser.add_argument("--nodes", type=int, default=1024, help="number of nodes of the tree")
    parser.add_argument("--vocab", type=int, default=128_256, help="number of tokens of the vocabulary")
    parser.add_argument("--trees", nargs="+", default=["dyspec", "topk"], help="names of the trees")
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
    print(
        "Memory before the step, and peaks before and after the target's forward pass and after the step. "
        "The unit is the logits."
    )


if __name__ == "__main__":
    main()
