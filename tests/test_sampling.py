"""Sampling parameters: what is allowed, what they make of logits, and that drafting leaves their law alone."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from exact import decoded, enumerate_branches
from foredraft import kernels as compiled
from foredraft.core.contracts import Budget
from foredraft.core.law import PrefixProcessor, TargetLaw, largest, warp
from foredraft.core.params import SamplingParams
from foredraft.core.processors import prefix_processors
from foredraft.core.tree import TreeBatch
from foredraft.drafters.lm import LMDrafter
from foredraft.models.table import TableTarget, random_law
from foredraft.rules import RULES
from foredraft.trees import GROWERS

NAN, INF = math.nan, math.inf

BAD = [
    ("temperature", [-0.1, NAN, INF], "0 (greedy) or above"),
    ("top_p", [0, -0.5, 1.01, NAN], "above 0 and at most 1"),
    ("top_k", [-2], "1 or above, or 0 (or -1)"),
    ("min_p", [-0.1, 1.1, NAN], "between 0 and 1"),
    ("repetition_penalty", [0, -1, NAN, INF], "above 0"),
    ("presence_penalty", [-2.1, 2.1, NAN], "between -2 and 2"),
    ("frequency_penalty", [-2.1, 2.1, NAN], "between -2 and 2"),
    ("max_tokens", [0, -1], "at least 1 (or None"),
    ("min_tokens", [-1], "at least 0"),
    ("n", [0, -1], "at least 1"),
    ("logprobs", [-2], "at least 0 (or -1"),
    ("prompt_logprobs", [-2], "at least 0 (or -1"),
    ("stop", ["", ["a", ""]], "empty string"),
    ("bad_words", [[""], ["a", " "]], "empty string"),
    ("allowed_token_ids", [[]], "at least one"),
    ("logit_bias", [{0: INF}, {0: NAN}], "below infinity"),
]

WRONG_TYPE = [
    *[(name, ["1", True, None], "must be") for name in ("temperature", "top_p", "min_p", "repetition_penalty")],
    *[(name, ["1", True, None], "between -2 and 2") for name in ("presence_penalty", "frequency_penalty")],
    *[(name, ["1", True, None, 1.0], "a whole number") for name in ("top_k", "min_tokens", "n")],
    *[(name, ["1", True, 1.0], "a whole number") for name in ("max_tokens", "logprobs", "prompt_logprobs", "seed")],
    ("stop", [5, [1]], "a string or a list of strings"),
    ("bad_words", [5, "word", [1]], "a list of strings"),
    *[(name, [5, "12", ["a"], [1.5], [True]], "a list of token ids") for name in ("stop_token_ids", "allowed_token_ids")],
    ("speculative", [True, 3, {}, {"method": 3}], "False or a dictionary"),
    ("output_kind", [None, 1, "DELTA"], "a RequestOutputKind"),
    ("logit_bias", [[1], {"1": 1.0}, {1: "a"}, {1: True}], "a dictionary of token ids and numbers"),
]


def each(rows: list[Any]) -> list[Any]:
    return [pytest.param(name, value, said, id=f"{name}={value!r}") for name, values, said in rows for value in values]


@pytest.mark.parametrize(("name", "value", "said"), each(BAD))
def test_values_out_of_range_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    assert name in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(("name", "value", "said"), each(WRONG_TYPE))
def test_values_of_another_type_are_refused(name: str, value: Any, said: str) -> None:
    sampling = SamplingParams()
    object.__setattr__(sampling, name, value)  # past the annotations, which are checked under pytest alone
    with pytest.raises(TypeError) as error:
        sampling.__post_init__()
    assert str(error.value).startswith(f"{name} must be") and said in str(error.value) and repr(value) in str(error.value)


def test_every_parameter_but_switches_is_checked() -> None:
    checked = {name for name, _, _ in (*BAD, *WRONG_TYPE)}
    assert set(SamplingParams.names()) - checked == {"include_stop_str_in_output", "ignore_eos", "skip_special_tokens"}


def test_more_tokens_asked_for_than_allowed() -> None:
    with pytest.raises(ValueError, match=r"min_tokens \(3\) must not exceed max_tokens \(2\)"):
        SamplingParams(min_tokens=3, max_tokens=2)
    assert SamplingParams(min_tokens=2, max_tokens=2).min_tokens == 2


@pytest.mark.parametrize(
    "fine",
    [
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 0.01, "presence_penalty": -2},
        {"temperature": 5e-324, "top_p": 5e-324, "top_k": 0, "min_p": 1, "frequency_penalty": 2, "seed": -1},
        {"max_tokens": 1, "min_tokens": 0, "n": 1, "logprobs": -1, "prompt_logprobs": 0, "seed": None, "stop": None},
        {"stop": [], "bad_words": [], "stop_token_ids": [], "logit_bias": {}, "allowed_token_ids": [0]},
        {"stop": ("a",), "stop_token_ids": (0, 1), "allowed_token_ids": range(3), "logit_bias": {0: -INF, 1: 2}},
    ],
)
def test_edges_are_allowed(fine: dict[str, Any]) -> None:
    sampling = SamplingParams(**fine)
    assert all(getattr(sampling, name) is value for name, value in fine.items())


@pytest.mark.parametrize(("stop", "strings"), [(None, []), ("ab", ["ab"]), (("a", "b"), ["a", "b"])])
def test_stop_strings_are_a_list(stop: Any, strings: list[str]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


def rows_of(vocab_size: int, seed: int = 0, rows: int = 6) -> Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_warp(logits: list[float], sampling: SamplingParams) -> list[float]:
    """One row, step by step."""
    best = max(range(len(logits)), key=lambda t: logits[t])
    if sampling.temperature == 0:
        return [float(t == best) for t in range(len(logits))]
    mass = [math.exp((logit - logits[best]) / sampling.temperature) for logit in logits]
    mass = [m if m >= sampling.min_p else 0.0 for m in mass]
    if sampling.top_k > 0:
        least = sorted(mass, reverse=True)[: sampling.top_k][-1]
        mass = [m if m >= least else 0.0 for m in mass]
    total, before, kept = sum(mass), 0.0, [0.0] * len(mass)
    for t in sorted(range(len(mass)), key=lambda t: -mass[t]):
        if sampling.top_p == 1 or before < sampling.top_p:
            kept[t] = mass[t]
        before += mass[t] / total
    return [m / sum(kept) for m in kept]


WARPS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.3},
    {"temperature": 50.0},
    *({"top_k": k} for k in (-1, 1, 2, 5, 1000)),
    *({"top_p": p} for p in (1e-9, 0.3, 0.9, 0.999)),
    *({"min_p": p} for p in (1e-6, 0.1, 0.7, 1.0)),
    {"temperature": 2.0, "top_k": 4, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 3, "top_p": 0.99, "min_p": 0.2},
]


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 200])
@pytest.mark.parametrize("options", WARPS, ids=str)
def test_warp_is_the_naive_law(options: dict[str, Any], vocab_size: int) -> None:
    logits, sampling = rows_of(vocab_size), SamplingParams(**options)
    probs = warp(logits, sampling)
    expected = torch.tensor([naive_warp(row, sampling) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(probs, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(probs > 0, expected > 0)
    single = warp(logits.float(), sampling)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(compiled.library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 1000, 40000])
@pytest.mark.parametrize("options", [one for one in WARPS if one.get("temperature") != 0], ids=str)
def test_the_compiled_law_is_the_plain_one(options: dict[str, Any], vocab_size: int) -> None:
    """The same tokens are kept, with equal probabilities; of equal logits too, and without those that are banned. Where many
    tokens stand at the edge of top-p, the rounding of float32 decides on a millionth of the mass.

    The exponent (logit - largest) / temperature rounds three times, the temperature included. The exponential is off by 1e-6 as
    its file states. The mass has the error of what it adds, and the mass at the edge. Reciprocal and product round once each.
    """
    logits = rows_of(vocab_size, seed=2).float()
    logits[1] = logits[1].round()  # many equal ones
    logits[2, ::3] = -INF
    logits[2, -1] = 0
    given = {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0} | options
    plain_warp, fast_warp = compiled.OPERATIONS["warp"]
    plain = plain_warp(logits.double(), **given)
    found = fast_warp(compiled.library(), logits, **given)
    edge = (found > 0) != (plain > 0)
    assert (found + plain)[edge].sum() < 1e-6
    rows = logits.double()
    exponents = (rows.amax(-1, keepdim=True) - rows) / given["temperature"]
    off = (found.double() - plain).abs()[~edge]
    unit, most = 2.0**-24, exponents[plain > 0].max()
    assert (off <= plain[~edge] * (2 * (3 * unit * most + 1e-6) + 2 * unit + 1e-6) + 2.0**-126).all()
    assert torch.equal(found[1:2], fast_warp(compiled.library(), logits[1:2], **given)), "rows are apart"


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"temperature": 0.4}, [TemperatureLogitsWarper(0.4)]),
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.7, "min_p": 0.02, "top_k": 9, "top_p": 0.8},
            [TemperatureLogitsWarper(1.7), MinPLogitsWarper(0.02), TopKLogitsWarper(9), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_warp_is_that_of_transformers(options: dict[str, Any], warpers: list[Any]) -> None:
    logits = rows_of(100, seed=1, rows=50)
    expected = LogitsProcessorList(warpers)(torch.empty(50, 0, dtype=torch.long), logits).softmax(-1)
    torch.testing.assert_close(warp(logits, SamplingParams(**options)), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("options", "logits", "probs"),
    [
        ({"temperature": 0}, [1, 3, 3, 2], [0, 1, 0, 0]),
        ({"temperature": 5e-324}, [1, 3, 3, 2], [0, 0.5, 0.5, 0]),
        ({"temperature": 1e-38}, [-6e4, 6e4, -INF, 5e4], [0, 1, 0, 0]),
        ({"temperature": 1e-3}, [0, 3, 2, 1], [0, 1, 0, 0]),
        ({"temperature": 1e300}, [0, 9, -9, -INF], [1 / 3, 1 / 3, 1 / 3, 0]),
        ({"top_k": 1}, [1, 3, 3, 2], [0, 0.5, 0.5, 0]),
        ({"top_k": 3}, [0, 0, -INF, -INF], [0.5, 0.5, 0, 0]),
        ({"top_p": 0.5}, [0, 0, 0, 0], [0.5, 0.5, 0, 0]),
        ({"top_p": 0.51}, [0, 0, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]),
        ({"top_p": 1e-30}, [0, 0, 1, 0], [0, 0, 1, 0]),
        ({"min_p": 1}, [2, 1, 2, -INF], [0.5, 0, 0.5, 0]),
    ],
)
def test_ties_and_extremes(options: dict[str, Any], logits: list[float], probs: list[float], dtype: torch.dtype) -> None:
    result = warp(torch.tensor([logits], dtype=dtype), SamplingParams(**options))
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result[0].tolist() == pytest.approx(probs, abs=1e-6)
    assert [p > 0 for p in result[0].tolist()] == [p > 0 for p in probs]


def naive_processed(logits: list[float], ids: list[int], num_prompt: int, options: dict[str, Any], words: list[list[int]]):
    """The row after every prefix-dependent parameter, in the order of the module; token 0 ends the output."""
    row, output = list(logits), ids[num_prompt:]
    for t in range(len(row)):
        if t not in options.get("allowed_token_ids", range(len(row))):
            row[t] = -INF
        if any(word[-1] == t and [*output, t][-len(word) :] == word for word in words):
            row[t] = -INF
        if t == 0 and len(output) < options.get("min_tokens", 0):
            row[t] = -INF
        row[t] += options.get("logit_bias", {}).get(t, 0.0)
        if t in ids:
            penalty = options.get("repetition_penalty", 1.0)
            row[t] = row[t] / penalty if row[t] > 0 else row[t] * penalty
        row[t] -= options.get("frequency_penalty", 0.0) * output.count(t)
        row[t] -= options.get("presence_penalty", 0.0) * (t in output)
    return row


PROCESSED: list[tuple[dict[str, Any], list[list[int]]]] = [
    ({"allowed_token_ids": [3, 1]}, []),
    ({}, [[2]]),
    ({}, [[1, 0], [0, 1, 2], [2, 2]]),
    ({"min_tokens": 2}, []),
    ({"logit_bias": {0: 2.5, 3: -1, 2: -INF}}, []),
    ({"repetition_penalty": 1.7}, []),
    ({"repetition_penalty": 0.5}, []),
    ({"presence_penalty": 1.5}, []),
    ({"frequency_penalty": -0.7}, []),
    ({"presence_penalty": -0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2}, []),
    (
        {"allowed_token_ids": [0, 1, 2], "min_tokens": 1, "logit_bias": {1: 3}, "repetition_penalty": 2}
        | {"presence_penalty": 1, "frequency_penalty": 0.5},
        [[2, 1], [0, 0]],
    ),
]


@pytest.mark.parametrize(("options", "words"), PROCESSED, ids=str)
def test_processors_are_the_naive_ones(options: dict[str, Any], words: list[list[int]]) -> None:
    """Prompts, outputs and paths of every length from 0 (the prompt from 1), and a row that is not changed in place."""
    rng, changed = np.random.default_rng(0), 0
    for trial in range(64):
        num_prompt = int(rng.integers(1, 4))
        committed = rng.integers(0, 4, num_prompt + trial % 4).tolist()
        path = rng.integers(0, 4, trial // 4 % 4).tolist()
        logits = torch.tensor(rng.normal(size=4))
        before, row = logits.clone(), logits
        for processor in prefix_processors(SamplingParams(**options), num_prompt, [0], words):
            row = processor(committed, path, row)
        expected = naive_processed(logits.tolist(), committed + path, num_prompt, options, words)
        assert row.tolist() == pytest.approx(expected, abs=1e-12)
        assert torch.equal(logits, before)
        changed += not torch.equal(row, logits)
    assert changed > 5


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    for seed, ids in enumerate([[3], [0, 0, 5], [1, 2, 3, 1, 6]]):
        logits = rows_of(7, seed, rows=1)
        [process] = prefix_processors(SamplingParams(repetition_penalty=penalty), 1, [])
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits)[0]
        assert torch.equal(process(ids[:1], ids[1:], logits[0]), expected)


def test_no_processors_without_need() -> None:
    for sampling in (SamplingParams(), SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1, seed=1, logit_bias={})):
        assert prefix_processors(sampling, 3, [0]) == []


def test_rows_are_computed_on_demand_and_kept() -> None:
    tree = TreeBatch.chains([[5, 6, 7, 8]], [[-1, 0, 0, 2]])[0]
    asked = []

    def shift(committed_ids: Any, path_ids: Any, logits: Tensor) -> Tensor:
        asked.append((list(committed_ids), list(path_ids)))
        return logits + torch.tensor([0.0, 10.0 * len(path_ids)])

    logits = torch.tensor([[2.0, 1.0]] * 4, dtype=torch.bfloat16)
    law = TargetLaw(logits, SamplingParams(temperature=0), tree, [4, 5], [shift])
    assert asked == []
    first = law.row(3)
    assert asked == [([4, 5], [7, 8])] and first.tolist() == [0, 1]
    rows = law.rows([3, 0, 1, 0])
    assert asked[1:] == [([4, 5], []), ([4, 5], [6])]
    assert [row.tolist() for row in rows] == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert rows[0] is first and law.row(3) is first and law.rows([]) == [] and len(asked) == 3
    assert law.raw_logprobs(3).tolist() == pytest.approx([math.log(1 / (1 + math.exp(-1))), math.log(1 / (1 + math.e))])
    assert law.raw_logprobs(3).dtype == torch.float32


def test_rows_of_a_law_without_processors() -> None:
    logits, sampling = rows_of(5), SamplingParams(temperature=0.5, top_k=3)
    law = TargetLaw(logits, sampling)
    torch.testing.assert_close(torch.stack(law.rows([4, 0])), warp(logits[[4, 0]], sampling))


# The law with a drafter under these parameters is that of plain decoding, every branch enumerated.

PROMPT = (1, 0)
EOS = 1

LAWS: dict[str, tuple[int, int, dict[str, Any], list[list[int]]]] = {  # vocabulary, length, parameters, bad words
    "repetition": (3, 3, {"repetition_penalty": 1.8}, []),
    "presence": (2, 4, {"presence_penalty": 1.2}, []),
    "frequency": (2, 4, {"frequency_penalty": 0.9}, []),
    "min_tokens": (2, 4, {"min_tokens": 2}, []),
    "bad_words": (3, 3, {}, [[2, 0], [0, 0, 2], [0, 1]]),
    "allowed": (3, 3, {"allowed_token_ids": [2, 0]}, []),
    "bias": (2, 4, {"logit_bias": {0: -0.8}}, []),
    "top_k": (3, 3, {"top_k": 2}, []),
    "top_p": (3, 3, {"top_p": 0.6, "temperature": 1.3}, []),
    "min_p": (3, 3, {"min_p": 0.5}, []),
    "greedy": (3, 4, {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.5}, []),
    "together": (
        3,
        3,
        {"min_tokens": 2, "repetition_penalty": 0.6, "presence_penalty": -0.7, "logit_bias": {2: 0.5}, "top_k": 2},
        [[0, 2]],
    ),
}

TREES = [
    ("dyspec", {}, "multiround", 2),
    ("branching", {"num_chains": 2}, "multiround-iid", 2),
    ("topk", {"topk": 2}, "deterministic", 6),
]
"""Grower, its options, rule, nodes."""

OutputLaw = dict[tuple[int, ...], float]


def without_path(processor: PrefixProcessor) -> PrefixProcessor:
    return lambda committed_ids, path_ids, logits: processor(committed_ids, [], logits)


def output_law(name: str, tree: Any, *, fault: bool = False, plain: bool = False) -> OutputLaw:
    """The law of the output, of plain decoding where there is no tree. `plain` leaves the parameters out."""
    vocab_size, length, options, words = LAWS[name]
    law, draft = random_law(vocab_size, 11), random_law(vocab_size, 12)
    sampling = SamplingParams() if plain else SamplingParams(**options)
    processors = [] if plain else prefix_processors(sampling, len(PROMPT), [EOS], words)

    def run(draws: Any) -> tuple[int, ...]:
        target = TableTarget(lambda prefix: 3 * law(prefix), vocab_size)  # logits of both signs
        given = [without_path(p) for p in processors] if fault else processors
        more: dict[str, Any] = {}
        if tree is not None:
            grower, grower_options, rule, nodes = tree
            drafter = LMDrafter(TableTarget(draft, vocab_size), GROWERS[grower].grower(**grower_options), vocab_size)
            more = {"drafter": drafter, "rule": RULES[rule].rule, "budget": Budget(nodes, 2)}
        one = decoded(target, PROMPT, sampling, draws, len(PROMPT) + length, eos=EOS, processors=given, **more)
        return tuple(one.output_ids)

    outputs: OutputLaw = defaultdict(float)
    for prob, output, _ in enumerate_branches(run):
        outputs[output] += prob
    return outputs


def distance(law: OutputLaw, other: OutputLaw) -> float:
    return max(abs(law.get(output, 0.0) - other.get(output, 0.0)) for output in law.keys() | other.keys())


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree[0])
@pytest.mark.parametrize("name", LAWS)
def test_drafting_leaves_the_law_alone(name: str, tree: Any) -> None:
    expected = output_law(name, None)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-12)
    law = output_law(name, tree)
    assert law.keys() == expected.keys()
    assert distance(law, expected) < 1e-12


@pytest.mark.parametrize("name", LAWS)
def test_the_parameters_change_the_law(name: str) -> None:
    assert distance(output_law(name, None), output_law(name, None, plain=True)) > 0.01


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        *((name, TREES[2]) for name in ("repetition", "presence", "frequency", "min_tokens", "bad_words")),
        *(("presence", tree) for tree in TREES[:2]),
    ],
)
def test_a_processor_blind_to_the_path_is_found_out(name: str, tree: Any) -> None:
    assert distance(output_law(name, tree, fault=True), output_law(name, None)) > 1e-3


@pytest.mark.skipif(compiled.library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize(("rows", "size", "k"), [(1, 4096, 8), (5, 4097, 64), (3, 17, 8), (2, 5, 8), (4, 96, 1), (2, 40, 40)])
def test_the_largest_by_compiled_code(rows: int, size: int, k: int) -> None:
    """As by torch where all differ; of equal ones the first, whichever stand beside them."""
    torch.manual_seed(0)
    x = torch.randn(rows, size)
    assert all(torch.equal(a, b) for a, b in zip(largest(x, k), x.topk(min(k, size)), strict=True))
    coarse = (x * 2).round()
    found = largest(coarse, k)
    assert torch.equal(found.values, coarse.topk(min(k, size)).values)
    for row, values, places in zip(coarse.tolist(), found.values.tolist(), found.places.tolist(), strict=True):
        order = sorted(range(size), key=lambda place: (-row[place], place))
        assert places == order[: len(places)]
        assert values == [row[place] for place in places]
