"""Measures the cost of one level of a head's drafting, relative to the bare matrix products of its layers.

    python benchmarks/draft_cost.py --output benchmarks/results/draft-cost.jsonl

A level is one call of the drafter's `expand` while it grows a tree after a cached prefix. It has 1 row in a small static tree,
and 10 rows in EAGLE-2's tree. The slots of parallel heads are filled once per step, so their level is the whole forward pass.

The bare products use the same packed weights, the same number of rows and the same number of threads. One call of the compiled
code computes them and nothing else. Level and products take turns, and each ratio is computed from one turn. The table shows
the median of the ratios and its 95 % interval, from order statistics and thus for any distribution.

The weights are random, which does not affect the cost. The widths are 1536 and the bundled target's. The weights have 16 bits,
or the default 4 bits. Torch uses one thread meanwhile, as in generation (`decode.paced`). Its idle workers would spin on the
processors that the compiled code needs.

| column | meaning |
|---|---|
| forwards | calls of the head for a whole tree |
| bare_ms | time of the products |
| forward_ms | time of the forward pass: products, attention, norms, writes to the cache |
| level_ms | time of `expand`: the forward pass and its preparation in Python |
| grown_ms | time from one `expand` to the next: also distributions, selection of nodes and growth of the tree |
| ratio | level / bare; `allowed` is its upper limit |
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from measuring import arguments, interval, median, report, rounded, rounds
from transformers import LlamaConfig, LlamaForCausalLM

from foredraft import SamplingParams, heads
from foredraft.core.contracts import Budget, Work
from foredraft.core.draws import Draws
from foredraft.core.progress import progress_bar
from foredraft.drafters import slots
from foredraft.drafters.compiled import CompiledLinear, compile_linears
from foredraft.drafters.ctc import CtcDrafter
from foredraft.drafters.recurrent import RecurrentDrafter
from foredraft.heads.folder import layer_config
from foredraft.heads.layers import Shape
from foredraft.kernels import library
from foredraft.kernels.layouts import FULL, QUANTIZED, TYPES
from foredraft.kernels.structures import CLinear
from foredraft.models.native import NativeTarget
from foredraft.trees import GROWERS

SIZES: dict[int, dict[str, int]] = {
    1536: {"intermediate_size": 4096, "num_attention_heads": 24, "num_key_value_heads": 8},
    384: {"intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2},
}
"""Widths and the sizes that belong to them. All have head_dim 64 and 4096 tokens."""

ALLOWED = {(1536, 1): 1.3, (1536, 10): 1.15, (384, 10): 1.7}
"""Upper limit of the ratio for EAGLE and FSPAD with weights of 16 bits, by width and number of rows."""

CONTEXT, BLOCK = 256, 10
"""Number of pairs in the cache, and number of turns of a setting before the next setting."""

TOKENS = list(range(7, 9 + CONTEXT))
"""The text of a request: the tokens of the pairs, and the token before the first pair."""

TREES = {1: ("static", Budget(4, 3)), 10: ("topk", Budget(10, 3))}
"""Trees and budgets, by the number of rows of their second and later levels."""

COLUMNS = (
    *("method", "width", "bits", "rows", "head_threads", "forwards", "bare_ms", "forward_ms", "level_ms", "grown_ms"),
    *("ratio", "ratio_low", "ratio_high", "allowed"),
)


class Products(NamedTuple):
    """Linear layers that run one after another, each on `rows` rows."""

    linears: Sequence[CLinear]
    rows: int


class Turn(NamedTuple):
    """Measurement of one tree and of the products, in seconds.

    Attributes:
        level: time of a level.
        forward: time of the compiled forward pass in it.
        grown: time from this level to the next.
        bare: time of the bare products.
        forwards: number of forward passes of the whole tree.
    """

    level: float
    forward: float
    grown: float
    bare: float
    forwards: int


@dataclass(eq=False)
class Setting:
    """One head that drafts trees, and its measurements.

    Attributes:
        rows: number of rows of a level.
        expander: object and method whose call is a level.
        counted: object and method whose call is a forward pass of the head.
        bare: runs the bare products.
    """

    method: str
    width: int
    bits: int
    rows: int
    drafter: Any
    state: Any
    budget: Budget
    expander: tuple[Any, str]
    counted: tuple[Any, str]
    bare: Callable[[], None]
    threads: int
    turns: list[Turn] = field(default_factory=list)

    def turn(self) -> Turn:
        """Measures one tree, then the products."""
        self.state.clear()
        with on_the_clock(*self.expander) as levels, on_the_clock(*self.counted) as forwards:
            self.drafter.propose(work(self.state, TOKENS[-1], self.budget))
        began = perf_counter()
        self.bare()
        bare = perf_counter() - began
        at = min(1, len(levels) - 1)  # the first level of a recurrent head also runs the new pairs of the text
        (start, end), ends = levels[at], [*levels[at + 1 :], (levels[at][1], 0.0)]
        inside = sum(e - s for s, e in forwards if start <= s and e <= end)
        return Turn(end - start, inside, ends[0][0] - start, bare, len(forwards))

    def row(self) -> dict[str, Any]:
        """Makes a row of medians over the turns, with times in milliseconds."""
        ratios = sorted(turn.level / turn.bare for turn in self.turns)
        low, high = interval(len(ratios))
        times = {f"{name}_ms": 1000 * median([getattr(turn, name) for turn in self.turns]) for name in Turn._fields[:4]}
        found = {"method": self.method, "width": self.width, "bits": self.bits, "rows": self.rows, "head_threads": self.threads}
        found |= {"context": CONTEXT, "turns": len(ratios), "forwards": self.turns[-1].forwards, **times}
        found |= {"ratio": median(ratios), "ratio_low": ratios[low], "ratio_high": ratios[high]}
        is_bound = self.method in ("eagle", "fspad") and self.bits == FULL
        allowed = ALLOWED.get((self.width, self.rows)) if is_bound else None
        return rounded({**found, "allowed": allowed})


@contextmanager
def on_the_clock(owner: Any, name: str) -> Iterator[list[tuple[float, float]]]:
    """Records the begin and end of every call of a method in a block."""
    real, calls = getattr(owner, name), []

    def run(*args: Any, **kwargs: Any) -> Any:
        began = perf_counter()
        out = real(*args, **kwargs)
        calls.append((began, perf_counter()))
        return out

    setattr(owner, name, run)
    try:
        yield calls
    finally:
        setattr(owner, name, real)


def bare(groups: Sequence[Products], threads: int) -> Callable[[], None]:
    """Returns a function that runs the products and nothing else."""
    code = library()
    assert code is not None
    calls = []
    for linears, rows in groups:
        x = torch.randn(rows, max(linear.inputs for linear in linears)).bfloat16()
        y = torch.empty(rows, max(linear.outputs for linear in linears))
        calls += [(ctypes.byref(linear), x, rows, y) for linear in linears]

    def run() -> None:
        for linear, x, rows, y in calls:
            code.linear(linear, TYPES[x.dtype], x.data_ptr(), rows, y.data_ptr(), threads)

    return run


def target_of(width: int) -> NativeTarget:
    """Makes a target of one layer with random weights. A head uses only its embedding and its output layer."""
    sizes = {"head_dim": 64, "vocab_size": 4096, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    config = LlamaConfig(hidden_size=width, **SIZES[width], **sizes)
    torch.manual_seed(0)
    weights = LlamaForCausalLM(config).bfloat16().state_dict()
    return NativeTarget(config, weights)


def started(drafter: Any, num_features: int) -> Any:
    """Starts a request with `CONTEXT` pairs in the drafter's cache and one more pair pending."""
    features = torch.randn(CONTEXT + 1, num_features).bfloat16()
    state = drafter.start(TOKENS[:-1], features[:CONTEXT])
    drafter.propose(work(state, TOKENS[-2], Budget(2, 2)))
    drafter.observe(state, TOKENS[-1:], features[CONTEXT:], [])
    drafter.propose(work(state, TOKENS[-1], Budget(2, 2)))
    return state


def work(state: Any, root: int, budget: Budget) -> Work:
    """Returns the work of one greedy request."""
    return Work([state], [root], [budget], [SamplingParams(temperature=0)], [Draws(0)])


def recurrent(method: str, target: NativeTarget, rows: int, bits: int) -> Setting:
    """Makes the setting of EAGLE, FSPAD or EAGLE-3."""
    config = layer_config(target.config, target.vocab_size)
    options: dict[str, Any] = {"feature_layers": (0, 1, -1)} if method == "eagle3" else {}
    head = heads.HEADS[method].make(Shape.of(config), **options).bfloat16()
    tree, budget = TREES[rows]
    drafter = RecurrentDrafter(head, config, target, GROWERS[tree].grower(), compiled=True, weight_bits=bits)
    state = started(drafter, len(head.feature_layers) * config.hidden_size)
    run: Any = drafter.compiled
    products = bare([Products(run.linears, rows)], run.threads)
    ends = (drafter, "expand"), (library(), "forward")
    return Setting(method, config.hidden_size, bits, rows, drafter, state, budget, *ends, products, run.threads)


def ctc(target: NativeTarget, bits: int) -> Setting:
    """Makes the setting of the CTC-based drafter. All slots are filled together; the first slot is the last pair."""
    config = layer_config(target.config, target.vocab_size)
    head = heads.HEADS["ctc"].make(Shape.of(config)).bfloat16()
    drafter = CtcDrafter(slots.LayerSlots(head, config, target, compiled=True, weight_bits=bits), None, target.vocab_size)
    state = started(drafter, config.hidden_size)
    run: Any = drafter.slots.compiled
    entry, ahead, *layer, last, blank = run.linears
    count = head.num_slots
    groups = Products([entry, ahead], 1), Products(layer, count), Products([last, blank], count)
    ends = (drafter.slots, "fill"), (library(), "forward")
    products, budget = bare(groups, run.threads), Budget(10, count)
    return Setting("ctc", config.hidden_size, bits, count, drafter, state, budget, *ends, products, run.threads)


def medusa(target: NativeTarget, bits: int) -> Setting:
    """Makes the setting of Medusa, whose heads all read one feature."""
    config = layer_config(target.config, target.vocab_size)
    head = heads.HEADS["medusa"].make(Shape.of(config)).bfloat16().requires_grad_(False)
    compile_linears(head, target, bits)
    drafter = slots.SlotDrafter(slots.FeatureSlots(head), GROWERS["topk"].grower(), target.vocab_size)
    state = started(drafter, config.hidden_size)
    linears = [module for module in head.modules() if isinstance(module, CompiledLinear)]
    products = bare([Products([linear.described for linear in linears], 1)], linears[0].threads)
    ends = (drafter.slots, "fill"), (drafter.slots.head, "forward")
    given = drafter, state, Budget(10, 4), *ends, products, linears[0].threads
    return Setting("medusa", config.hidden_size, bits, 1, *given)


def settings(widths: Sequence[int]) -> list[Setting]:
    """Makes all settings."""
    found = []
    for width in widths:
        target = target_of(width)
        for bits in (FULL, QUANTIZED):
            found += [recurrent(method, target, rows, bits) for method in ("eagle", "fspad", "eagle3") for rows in TREES]
            found += [ctc(target, bits), medusa(target, bits)]
    return found


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, models=False, minutes=4.0)
    parser.add_argument("--widths", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="widths of the heads")
    parser.add_argument("--rounds", type=int, default=30, help=f"rounds of {BLOCK} turns per setting, after a warm-up round")
    parser.add_argument("--threads", type=int, help="number of threads; default: torch's. A small head uses one")
    args = parser.parse_args()
    if library() is None:
        parser.exit(1, "error: heads are compiled only on CPUs with AVX-512 BF16\n")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with torch.inference_mode():
        every = settings(args.widths)
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        with progress_bar("measuring", (args.rounds + 1) * len(every)) as advance:
            for number in rounds(args.rounds + 1, args.minutes):
                for setting in every:
                    turns = [setting.turn() for _ in range(BLOCK)]
                    setting.turns += turns if number else []
                    advance(1)
        torch.set_num_threads(usual)
    rows = [setting.row() for setting in every if setting.turns]
    report(args.output, rows, COLUMNS, device=torch.device("cpu"), dtype="bfloat16")


if __name__ == "__main__":
    main()
