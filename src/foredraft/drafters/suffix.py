"""Lookup with a suffix automaton: drafts a tree of all earlier continuations of the longest repeated suffix of the text."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from foredraft.core.contracts import Budget, Features, Work
from foredraft.core.setting import Setting
from foredraft.core.tree import TreeBatch
from foredraft.drafters.options import check_options


@dataclass
class SuffixAutomaton:
    """The smallest automaton of all substrings of a growing text, built token by token.

    Each state represents the substrings that end at the same set of positions. State 0 is the empty string.

    Attributes:
        lengths: length of the longest substring of each state.
        links: for each state, the state of the longest suffix that ends at more positions.
        edges: for each state, a map from the next token to the next state.
        counts: for each state, the number of positions at which its substrings end.
        last: the state of the whole text.

    Source: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text".
    """

    lengths: list[int] = field(default_factory=lambda: [0])
    links: list[int] = field(default_factory=lambda: [-1])
    edges: list[dict[int, int]] = field(default_factory=lambda: [{}])
    counts: list[int] = field(default_factory=lambda: [0])
    last: int = 0

    def extend(self, token: int) -> None:
        """Appends one token. The time is amortised constant, apart from the update of the counts."""
        new = self._new_state(self.lengths[self.last] + 1, {})
        at = self.last
        while at >= 0 and token not in self.edges[at]:
            self.edges[at][token] = new
            at = self.links[at]
        self.links[new] = 0 if at < 0 else self._suffix_state(at, token)
        self.last = new
        while new > 0:
            self.counts[new] += 1
            new = self.links[new]

    def _suffix_state(self, at: int, token: int) -> int:
        """Returns the state of (longest substring of `at`) + token. If longer substrings share that state, splits it."""
        state = self.edges[at][token]
        if self.lengths[state] == self.lengths[at] + 1:
            return state
        clone = self._new_state(self.lengths[at] + 1, dict(self.edges[state]))
        self.links[clone], self.counts[clone] = self.links[state], self.counts[state]
        self.links[state] = clone
        while at >= 0 and self.edges[at].get(token) == state:
            self.edges[at][token] = clone
            at = self.links[at]
        return clone

    def _new_state(self, length: int, edges: dict[int, int]) -> int:
        self.lengths.append(length)
        self.links.append(-1)
        self.edges.append(edges)
        self.counts.append(0)
        return len(self.lengths) - 1

    @property
    def match(self) -> int:
        """The state of the longest suffix of the text that also occurs earlier in it; 0 if there is none."""
        return max(self.links[self.last], 0)


class SuffixDrafter:
    """Drafts a tree of the most frequent continuations of the longest repeated suffix of prompt and output.

    Args:
        suffix_decoding_max_tree_depth: maximum depth of the tree.
        suffix_decoding_max_spec_factor: a match of m tokens allows a depth of at most this factor times m.
        suffix_decoding_min_token_prob: a path is drafted only if at least this share of the matches continued along it.

    Source: Hu et al., SAM decoding (arXiv 2411.10666); Oliaro et al., SuffixDecoding (arXiv 2411.04975). The option names are
    vLLM's.
    """

    feature_layers: Sequence[int] = ()
    ahead = bytes_per_token = 0

    def __init__(
        self,
        suffix_decoding_max_tree_depth: int = 24,
        suffix_decoding_max_spec_factor: float | int = 1.0,
        suffix_decoding_min_token_prob: float | int = 0.1,
    ):
        check_options(
            suffix_decoding_max_tree_depth=suffix_decoding_max_tree_depth,
            suffix_decoding_max_spec_factor=suffix_decoding_max_spec_factor,
            suffix_decoding_min_token_prob=suffix_decoding_min_token_prob,
        )
        self._max_depth = suffix_decoding_max_tree_depth
        self._factor = suffix_decoding_max_spec_factor
        self._min_prob = suffix_decoding_min_token_prob

    @classmethod
    def build(cls, setting: Setting, **options: float) -> SuffixDrafter:
        """Builds the drafter of a speculative config."""
        return cls(**options)  # type: ignore[arg-type]

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> SuffixAutomaton:
        """Returns the state of a new request, which is the automaton of its text."""
        state = SuffixAutomaton()
        self.observe(state, tokens, None, ())
        return state

    def written(self, state: SuffixAutomaton) -> None:
        """Returns None, because the drafter has no keys and values."""

    def finish(self, state: SuffixAutomaton) -> None:
        """Does nothing, because no resources are held."""

    def propose(self, work: Work) -> TreeBatch:
        """Returns one tree per request; the root alone if no suffix is repeated."""
        trees = [self._grow(*given) for given in zip(work.states, work.roots, work.budgets, strict=True)]
        return TreeBatch.chains([tokens for tokens, _ in trees], [parents for _, parents in trees])

    def observe(self, state: SuffixAutomaton, tokens: Sequence[int], features: Features | None, path: Sequence[int]) -> None:
        """Adds the new tokens to the automaton."""
        for token in tokens:
            state.extend(token)

    def _grow(self, automaton: SuffixAutomaton, root: int, budget: Budget) -> tuple[list[int], list[int]]:
        """Adds the most frequent paths first. The parent and the more frequent siblings of a node thus come before it."""
        tokens, parents, match = [root], [-1], automaton.match
        deepest = min(budget.depth, self._max_depth, int(self._factor * automaton.lengths[match]))
        frontier: list[tuple[float, int, int, int, int]] = []  # (-prob, depth, token, parent, state)

        def offer(node: int, at: int, prob: float, depth: int) -> None:
            total = sum(automaton.counts[child] for child in automaton.edges[at].values())
            for token, child in automaton.edges[at].items():
                share = prob * automaton.counts[child] / total
                if depth <= deepest and share >= self._min_prob:
                    heapq.heappush(frontier, (-share, depth, token, node, child))

        offer(0, match, 1.0, 1)
        while frontier and len(tokens) <= budget.nodes:
            share, depth, token, parent, at = heapq.heappop(frontier)
            tokens.append(token)
            parents.append(parent)
            offer(len(tokens) - 1, at, -share, depth + 1)
        return tokens, parents
