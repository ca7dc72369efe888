"""What a speculative_config means, and what is said of one that means nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from foredraft.core.contracts import Budget
from foredraft.core.shape import MAX_DEPTH, MAX_NODES
from foredraft.core.tree import Drawn
from foredraft.drafters import DRAFTERS
from foredraft.plan.config import USUAL_TREE, can_use, drafter_alone, parse, with_usual_method, with_usual_tree
from foredraft.plan.speculation import AUTO, Way, fitting_rules
from foredraft.rules import RULES
from foredraft.trees import GROWERS

EXACT = {name for name, row in RULES.items() if row.guarantee.startswith("exact")}
OWN_TREE = [name for name, row in DRAFTERS.items() if row.makes_own]
GROWN = [(name, tree) for name, row in DRAFTERS.items() for tree in GROWERS if GROWERS[tree].needs == row.gives]


def refusal(config: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        parse(config)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_what_is_left_out_is_to_be_chosen() -> None:
    found = parse({})
    assert found is not None
    assert (found.drafter, found.tree, found.rule_name, found.budget, found.is_open) == ("lm", AUTO, None, None, True)
    assert (found.model, found.drafter_options, found.grower_options) == (None, {}, {})
    assert found.ways(has_model=True) == [Way("lm", name) for name, row in GROWERS.items() if row.needs == "expand"]
    assert parse({"method": None, "tree": None, "rule": None, "num_speculative_tokens": None}) == found
    assert parse({"tree": "auto", "num_speculative_tokens": "auto"}) == found


@pytest.mark.parametrize("tree", GROWERS)
def test_whatever_tree_is_chosen_its_rule_is_exact(tree: str) -> None:
    open_one, named = parse({}), parse({"tree": tree, "num_speculative_tokens": 4})
    assert open_one is not None and named is not None
    assert open_one.rule_for(tree) is named.rule_for(tree) is RULES[GROWERS[tree].rule].rule
    assert GROWERS[tree].rule in EXACT & set(fitting_rules(GROWERS[tree]))
    assert (named.ways(has_model=True), named.is_open) == ([Way("lm", tree)], False)


@pytest.mark.parametrize("rule", RULES)
def test_with_a_rule_only_its_trees_are_chosen_from(rule: str) -> None:
    found = parse({"rule": rule})
    assert found is not None
    trees = [way.tree for way in found.ways(has_model=True)]
    assert trees
    assert trees == [name for name in GROWERS if rule in fitting_rules(GROWERS[name])]
    assert {found.rule_for(tree) for tree in trees} == {RULES[rule].rule}


def test_the_method_can_be_chosen_too() -> None:
    found = parse({"method": "auto"})
    assert found is not None
    free = [Way("ngram", None), Way("suffix", None)]
    assert found.ways(has_model=False) == free
    grown, behind = ([Way(name, tree) for tree in GROWERS] for name in ("lm", "lm-lookup"))
    assert found.ways(has_model=True) == [*grown, *free, *behind]
    only = parse({"method": "auto", "rule": "block"})
    assert only is not None
    assert only.ways(has_model=True) == [Way("lm", "chain"), Way("ngram", None), Way("lm-lookup", "chain")]


def test_everything_given() -> None:
    found = parse(
        {"method": "lm", "model": "DIR", "tree": "topk", "topk": 3, "num_speculative_tokens": 5, "rule": "multiround"}
    )
    assert found is not None
    assert (found.drafter, found.model, found.tree, found.rule_name) == ("lm", "DIR", "topk", "multiround")
    assert (found.budget, found.drafter_options, found.grower_options) == (Budget(5, 5), {}, {"topk": 3})


def test_plain_decoding_drafts_nothing() -> None:
    assert parse({"method": "ar"}) is None
    assert parse({"method": "ar", "tree": "auto", "num_speculative_tokens": "auto"}) is None
    assert parse({"method": "ar", "model": None, "rule": None, "num_speculative_tokens": None}) is None


@pytest.mark.parametrize(("method", "tree"), GROWN)
def test_without_a_rule_the_trees_own_exact_one(method: str, tree: str) -> None:
    found = parse({"method": method, "tree": tree})
    assert found is not None
    assert found.rule_name in EXACT & set(fitting_rules(GROWERS[tree]))
    expected = {Drawn.DETERMINISTIC: "deterministic", Drawn.WITHOUT_REPLACEMENT: "multiround", Drawn.IID: "multiround-iid"}
    assert found.rule_name == ("block" if tree == "chain" else expected[GROWERS[tree].drawn])


@pytest.mark.parametrize("method", OWN_TREE)
def test_without_a_rule_a_drafters_own_tree_has_the_deterministic_one(method: str) -> None:
    found = parse({"method": method})
    assert found is not None
    assert (found.tree, found.rule_name) == (None, "deterministic")
    assert found.grower(None, {"acceptance": [0.5]}) is None


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tree", GROWERS)
def test_every_tree_with_every_rule(tree: str, rule: str) -> None:
    """What can be used is what the rule was made for; nothing else gets through, and the message names all that would."""
    row, drawn = RULES[rule], GROWERS[tree].drawn
    fits = drawn in row.drawn and (tree == "chain" or not row.chains_only)
    if fits:
        found = parse({"tree": tree, "rule": rule})
        assert found is not None
        assert found.rule_name == rule
    else:
        said = refusal({"tree": tree, "rule": rule})
        assert said.startswith(f"rule {rule!r} is not exact for tree {tree!r}. Rules that can be used with it: ")
        assert [one.removesuffix(" (lossy)") for one in said.split(": ")[1].split(", ")] == fitting_rules(GROWERS[tree])
        assert "typical (lossy)" in said


@pytest.mark.parametrize("method", OWN_TREE)
@pytest.mark.parametrize("rule", RULES)
def test_every_own_tree_with_every_rule(method: str, rule: str) -> None:
    config = {"method": method, "rule": rule}
    if DRAFTERS[method].chains_only or not RULES[rule].chains_only:
        assert parse(config) is not None
    else:
        assert refusal(config).startswith(f"rule {rule!r} is not exact for the tree of method {method!r}. ")


@pytest.mark.parametrize(
    ("config", "near"),
    [
        ({"method": "ngrm"}, "unknown method 'ngrm'. Did you mean 'ngram'? Allowed: lm, ngram, suffix, eagle, "),
        ({"method": "LM"}, "unknown method 'LM'. Did you mean 'lm'?"),
        ({"tree": "dyspec_threshold"}, "unknown tree 'dyspec_threshold'. Did you mean 'dyspec-threshold'?"),
        ({"method": "suffix", "tree": "chian"}, "unknown tree 'chian'. Did you mean 'chain'?"),
        ({"rule": "multi-round"}, "unknown rule 'multi-round'. Did you mean 'multiround'? Allowed: chain, multiround"),
        ({"tree": "dyspec", "rule": ""}, "unknown rule ''. Allowed: multiround, typical"),
        ({"num_speculative_token": 4}, "method 'lm': 'num_speculative_token'. Did you mean 'num_speculative_tokens'?"),
        ({"tree": "topk", "top_k": 3}, "tree 'topk': 'top_k'. Did you mean 'topk'?"),
        (
            {"tree": "chain", "num_chains": 3},
            "unknown key of speculative_config for method 'lm' and tree 'chain': 'num_chains'",
        ),
        ({"method": "ngram", "prompt_lookup_mx": 3}, "method 'ngram': 'prompt_lookup_mx'. Did you mean 'prompt_lookup_max'?"),
        ({"method": "ngram", "draft_temperature": 1}, "unknown key of speculative_config for method 'ngram': 'draft_temp"),
        ({"method": "ar", "draft_dept": 3}, "unknown key of speculative_config: 'draft_dept'. Did you mean 'draft_depth'?"),
        ({"method": "ar", "tree": "dyspek"}, "unknown tree 'dyspek'. Did you mean 'dyspec'?"),
        ({"method": "ar", "rule": "blok"}, "unknown rule 'blok'. Did you mean 'block'?"),
        ({3: 4}, "unknown key of speculative_config for method 'lm': 3. Allowed: method, model, "),
        (
            {"method": "ngram", "tree": "chain"},
            "method 'ngram' cannot grow tree 'chain'. It makes its own tree: leave 'tree' out",
        ),
    ],
)
def test_wrong_names(config: dict[Any, Any], near: str) -> None:
    assert near in refusal(config)


@pytest.mark.parametrize("nodes", [1, 2, 63, 64, 65, MAX_NODES])
def test_budgets(nodes: int) -> None:
    found = parse({"num_speculative_tokens": nodes})
    assert found is not None
    assert found.budget == Budget(nodes, min(nodes, MAX_DEPTH))


@pytest.mark.parametrize("nodes", [0, -1, MAX_NODES + 1, 10**30])
@pytest.mark.parametrize("method", DRAFTERS)
def test_budgets_out_of_range(nodes: int, method: str) -> None:
    said = refusal({"method": method, "num_speculative_tokens": nodes})
    assert (
        f"num_speculative_tokens (--budget) must be between 1 and 1024, got {nodes}. To draft nothing use method 'ar'" == said
    )


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"tree": "topk", "draft_depth": "DEPTH"}, "draft_depth"),
        ({"tree": "branching", "draft_depth": "DEPTH"}, "draft_depth"),
        ({"tree": "branching", "expansion": "ONES"}, "expansion"),
        ({"tree": "static", "paths": "CHAIN"}, "paths"),
    ],
)
def test_depth_64_is_allowed_and_65_is_not(config: dict[str, Any], key: str) -> None:
    def deep(depth: int) -> dict[str, Any]:
        values = {"DEPTH": depth, "ONES": [1] * depth, "CHAIN": [[0] * (i + 1) for i in range(depth)]}
        return config | {key: values[config[key]]}

    assert parse(deep(64)) is not None
    assert refusal(deep(65)) == f"{key} must be at most 64 deep, got 65"


def test_suffix_trees_of_depth_64_are_allowed_and_of_65_are_not() -> None:
    assert parse({"method": "suffix", "suffix_decoding_max_tree_depth": 64}) is not None
    said = refusal({"method": "suffix", "suffix_decoding_max_tree_depth": 65})
    assert said == "suffix_decoding_max_tree_depth must be between 1 and 64, got 65"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "speculative_config must be a dict such as {'method': 'lm', 'model': 'DIR'}, got None"),
        ("lm", "speculative_config must be a dict"),
        ({"method": ["lm"]}, "method must be a name, got ['lm']"),
        ({"tree": {"chain": 1}}, "tree must be a name, got {'chain': 1}"),
        ({"rule": 3}, "rule must be a name, got 3"),
        ({"num_speculative_tokens": "8"}, "num_speculative_tokens must be a whole number or 'auto', got '8'"),
        ({"num_speculative_tokens": 8.0}, "num_speculative_tokens must be a whole number or 'auto', got 8.0"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens must be a whole number or 'auto', got True"),
        ({"draft_temperature": "hot"}, "draft_temperature must be a number or null, got 'hot'"),
        ({"draft_sampling": 1}, "draft_sampling must be a string, got 1"),
        ({"tree": "topk", "topk": None}, "topk must be a whole number, got None"),
        ({"tree": "topk", "topk": 2.5}, "topk must be a whole number, got 2.5"),
        ({"tree": "topk", "topk": True}, "topk must be a whole number, got True"),
        ({"tree": "branching", "merge": 1}, "merge must be true or false, got 1"),
        ({"tree": "branching", "expansion": 3}, "expansion must be a list (each a whole number) or null, got 3"),
        ({"tree": "branching", "expansion": [2, "1"]}, "expansion must be a list (each a whole number) or null, got [2, '1']"),
        ({"tree": "static", "paths": [0]}, "paths must be a list (each a list (each a whole number)) or null, got [0]"),
        ({"tree": "sequoia", "acceptance": "0.5"}, "acceptance must be a list (each a number) or an object or null, got '0.5'"),
        ({"method": "ngram", "prompt_lookup_max": "4"}, "prompt_lookup_max must be a whole number, got '4'"),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": "x"}, "suffix_decoding_max_spec_factor must be a number"),
    ],
)
def test_wrong_types(config: Any, said: str) -> None:
    assert refusal(config, TypeError).startswith(said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"draft_temperature": 0}, "draft_temperature must be above 0"),
        ({"draft_sampling": "greedy"}, "draft_sampling must be 'auto' or 'sampled', got 'greedy'"),
        ({"tree": "topk", "topk": 0}, "topk and draft_depth must be at least 1"),
        ({"tree": "opt", "delta": 1.5}, "delta must be between 0 and 1, got 1.5"),
        ({"tree": "branching", "num_chains": 0}, "num_chains and draft_depth must be at least 1"),
        ({"tree": "branching", "expansion": [2, 0]}, "expansion must list a number of draws, at least 1"),
        ({"tree": "static", "paths": [[0, 0]]}, "[0, 0] lacks [[0]]"),
        ({"tree": "sequoia", "acceptance": [0.5, 1.5]}, "acceptance must be a list of probabilities"),
    ],
)
def test_numbers_out_of_range(config: dict[str, Any], said: str) -> None:
    assert said in refusal(config)


def test_what_was_measured_fills_only_what_was_left_open() -> None:
    measured = {"acceptance": [0.7, 0.2], "else": 1}
    chosen = [parse({"tree": "sequoia", **more}) for more in ({}, {"acceptance": [0.5, 0.0]})]
    assert [one.grower("sequoia", measured).acceptance for one in chosen if one] == [[0.7, 0.2], [0.5, 0.0]]
    other = parse({"tree": "chain"})
    assert other is not None
    assert other.grower("chain", measured) == GROWERS["chain"].grower()


HEAD = str(Path(__file__).parent / "data" / "heads" / "hydra")


@pytest.mark.parametrize(
    ("config", "bundled", "method"),
    [
        ({}, True, AUTO),
        ({}, False, "suffix"),
        ({"num_speculative_tokens": 4}, True, "lm"),
        ({"num_speculative_tokens": 4}, False, "suffix"),
        ({"tree": "dyspec"}, False, "lm"),
        ({"model": HEAD}, False, "hydra"),
        ({"model": HEAD, "method": "hydra-lookup"}, True, "hydra-lookup"),
    ],
)
def test_the_method_of_a_command_that_names_none(config: dict[str, Any], bundled: bool, method: str) -> None:
    assert with_usual_method(config, bundled=bundled) == {**config, "method": method}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"method": "lm"}, {"method": "lm", "tree": USUAL_TREE}),
        ({"method": "lm", "tree": "opt"}, {"method": "lm", "tree": "opt"}),
        ({"method": "lm", "rule": "block"}, {"method": "lm", "rule": "block"}),
        ({"method": "ctc"}, {"method": "ctc"}),
        ({"method": "ar", "num_speculative_tokens": 8}, {"method": "ar"}),
        ({}, {}),
    ],
)
def test_the_tree_of_an_audit_that_names_none(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert with_usual_tree(config) == wanted


def test_a_drafter_alone_has_its_draft_model_and_no_lookup() -> None:
    assert drafter_alone(None) == {"method": "lm"}
    assert drafter_alone(HEAD) == {"method": "hydra", "model": HEAD}
    assert drafter_alone(HEAD, "hydra-lookup") == {"method": "hydra", "model": HEAD}
    assert drafter_alone(None, "unknown") == {"method": "unknown"}  # `parse` refuses it


def test_the_methods_that_can_use_a_head() -> None:
    assert [name for name in (*DRAFTERS, AUTO, "ar") if can_use(name, HEAD)] == ["hydra", "hydra-lookup", AUTO]
    assert [name for name in (*DRAFTERS, AUTO, "ar") if can_use(name, None)] == ["lm", "lm-lookup", AUTO]
