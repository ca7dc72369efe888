"""Compares the steps of models on the Transformers path between two checkouts of this repository, in pairs.

The models are random, with the sizes below. Each checkout runs in a process of its own, and they take turns; one sleeps while
the other runs. A pair is the ratio of the median times of a step in one turn (drafting, forward, rule and cache). The interval
is that of the median of the pairs (bootstrap, 95 %).

    python benchmarks/transformers_path.py --before CHECKOUT --output FILE
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

from revisions import HERE, PAUSE_S, Checkout, interval

SIZES: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
FAMILIES: dict[str, Any] = {
    "gpt_neox": {"intermediate_size": 2048},
    "gemma2": {"intermediate_size": 1536, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 128},
}
"""Model types with further sizes. Every other layer of gemma2 has a window."""

PLACES = ((1, 64), (1, 512), (8, 64), (8, 512))
"""Numbers of requests, and numbers of tokens of their prompts."""

METHODS: dict[str, dict[str, Any]] = {"ar": {"method": "ar"}, "ngram": {"method": "ngram", "num_speculative_tokens": 4}}


def work(given: dict[str, Any]) -> None:
    """Answers requests on the standard input, a line each: a family, a method, a number of requests and their length."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from foredraft import LLM, SamplingParams

    shares = {"enable_prefix_caching": False} if Path("src/foredraft/cache/prefixes.py").exists() else {}
    torch.manual_seed(0)
    llms = {}
    for family, sizes in FAMILIES.items():
        config = AutoConfig.for_model(family, **SIZES, **sizes, max_position_embeddings=1024)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        llm = LLM(model, {"method": "ar"}, device="cpu", max_num_seqs=max(count for count, _ in PLACES), **shares)
        llms |= {(family, name): llm.with_speculation(method) for name, method in METHODS.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        family, method, count, length = json.loads(line)
        prompts = [[1 + (31 * i + j * j) % 97 for j in range(length)] for i in range(count)]
        params = SamplingParams(temperature=0, max_tokens=given["tokens"], ignore_eos=True)
        outputs = llms[family, method].generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        records = outputs[0].outputs[0].records[1:]  # without the end of the prompt
        seconds = median(record.draft_s + record.verify_s + record.rule_s + record.cache_s for record in records)
        print(json.dumps([seconds, [list(output.outputs[0].token_ids) for output in outputs]]), flush=True)


def main() -> None:
    """Measures, writes and prints."""
    import torch
    from measuring import arguments, report, rounded, rounds

    parser = arguments(__doc__, models=False, minutes=6)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, whose kernels are built")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    checkouts = [Checkout(folder, {"tokens": given.max_tokens}, Path(__file__)) for folder in (given.before.resolve(), HERE)]
    cases = [(family, method, *place) for family in FAMILIES for method in METHODS for place in PLACES]
    seconds: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    equal: dict[Any, int] = {}
    for number in rounds(given.rounds, given.minutes):
        for case in cases:
            answers = {}
            for which in (0, 1) if number % 2 else (1, 0):
                sleep(PAUSE_S)
                answers[which] = checkouts[which].ask(*case)
            seconds[case].append((answers[0][0], answers[1][0]))
            equal[case] = sum(map(list.__eq__, answers[0][1], answers[1][1]))
    rows = []
    for case, pairs in seconds.items():
        row = dict(zip(("model", "method", "requests", "prompt"), case, strict=True))
        names = ("before_ms", "after_ms")
        row |= {name: 1e3 * median(times) for name, times in zip(names, zip(*pairs, strict=True), strict=True)}
        row |= dict(zip(("ratio", "ratio_low", "ratio_high"), interval([b / a for a, b in pairs]), strict=True))
        rows.append(rounded(row | {"equal_outputs": equal[case], "pairs": len(pairs)}))
    columns = ["model", "method", "requests", "prompt", "before_ms", "after_ms", "ratio", "ratio_low", "ratio_high"]
    report(given.output, rows, [*columns, "equal_outputs", "pairs"], device=torch.device("cpu"), dtype="float32")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(json.loads(sys.argv[-1]))
    else:
        main()
