"""Decides what each step runs: admits waiting requests, cuts prompts into chunks, and preempts when blocks run out."""

from __future__ import annotations

from collections.abc import Iterable

from foredraft.cache.blocks import BLOCK, OutOfBlocksError, num_blocks
from foredraft.cache.prefixes import Key, Prefixes, Trail
from foredraft.core.contracts import Pool
from foredraft.engine.drafting import NOTHING, Drafting, budgets_of
from foredraft.engine.order import put, take_out
from foredraft.engine.request import Sequence
from foredraft.engine.schedule import Schedule

_LEAST_CHUNK = BLOCK
"""Rows that a step leaves for prompts, even if trees fill it."""

_MOST_LOOKED_AT = 4
"""So many times the number of places is the number of waiting sequences that a step may look at."""


class Scheduler:
    """The waiting and the running sequences of an engine, each in the order in which they are served.

    Sequences of smaller priority come first, and among equals those that arrived first. If blocks run out, the last running
    sequence is preempted: its blocks are released, it waits, and its tokens are computed again later.

    Args:
        pool: the target's pool.
        max_num_seqs: maximum number of running sequences.
        max_rows: maximum number of rows of a step.
        caching: whether requests share prefixes. Outputs of the same request always do.

    Attributes:
        unreported: sequences with new tokens or an end, which the engine has not reported yet.
    """

    def __init__(self, pool: Pool, *, max_num_seqs: int, max_rows: int, caching: bool = True):
        self.pool = pool
        self._max_num_seqs, self._max_rows, self._caching = max_num_seqs, max_rows, caching
        self._prefixes = Prefixes(pool.blocks)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.unreported: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue."""
        put(self.waiting, sequence)

    def schedule(self) -> Schedule:
        """Chooses the rows of the next step, and reserves their blocks."""
        schedule, rows = Schedule(), self._max_rows
        late = [sequence for sequence in self.running if sequence.num_missing]
        decoding = [sequence for sequence in self.running if not sequence.num_missing]
        coming = self.waiting[: self._max_num_seqs - len(self.running)]
        prompts = sum(sequence.num_missing for sequence in late) + sum(len(sequence.token_ids) for sequence in coming)
        budgets = budgets_of(decoding, len(decoding), min(rows, prompts))
        for sequence, budget in zip(decoding, budgets, strict=True):
            if sequence.cache is None:
                continue  # preempted for one before it
            if self._reserve(sequence, sequence.cache.length + _ahead(sequence, budget.nodes), schedule):
                schedule.add_tree(sequence, budget)
                rows -= 1 + budget.nodes
        rows = max(rows, _LEAST_CHUNK)
        for sequence in late:
            if sequence.cache is not None:
                rows -= self._chunk(sequence, rows, schedule)
        computed = {_soon_published(sequence) for sequence in self.running} if self.waiting else set()
        for sequence in self.waiting[: _MOST_LOOKED_AT * self._max_num_seqs]:
            if len(self.running) == self._max_num_seqs or rows <= 0:
                break
            key = self._first_missing(sequence)
            if key is not None and key in computed:
                continue  # soon another sequence has computed what this one needs
            if not self._admit(sequence):
                break
            computed.add(_soon_published(sequence))
            rows -= self._chunk(sequence, rows, schedule)
        return schedule

    def publish(self, sequence: Sequence) -> None:
        """Lets other requests find the blocks of a sequence that are written."""
        held = sequence.cache.length
        for trail, drafts in ((sequence.trail, sequence.drafts), (sequence.plain_trail, False)):
            if trail is None or held < (trail.count + 1) * BLOCK or (drafts and sequence.missed):
                continue  # nothing new is written, if only because the drafter pauses
            written = sequence.drafting.written(sequence) if drafts else held
            if written >= (trail.count + 1) * BLOCK:
                self._prefixes.publish(trail, sequence.cache.blocks, sequence.token_ids, written)

    def make_room(self, schedule: Schedule, *, is_drafted: bool = False) -> None:
        """Preempts the last running sequence, even if it is part of the step.

        Args:
            is_drafted: whether the trees of the step may be drafted already. What was drafted must not decide on the size of a
                tree, so the sequence drafts the same tree when it runs again.
        """
        last = self.running[-1]
        if is_drafted and last in schedule.trees:
            last.owed = schedule.budgets[schedule.trees.index(last)]
        schedule.drop(last)
        self.preempt(last)

    def preempt(self, sequence: Sequence) -> None:
        """Releases what a running sequence holds, and lets it wait."""
        if sequence.scores_prompt:
            sequence.prompt_logprobs = None  # of a part of the prompt
        self.add(sequence)
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Takes a sequence out of the queue or of the running ones, and releases what it holds."""
        take_out(self.waiting if sequence.cache is None else self.running, sequence)
        try:
            if sequence.drafting is not None:
                sequence.drafting.finish(sequence)
        finally:
            if sequence.cache is not None:
                self.pool.free(sequence.cache)
            sequence.cache = sequence.trail = sequence.plain_trail = None

    def put_back(self, others: Iterable[Sequence] = ()) -> None:
        """Lets everything that runs wait, and frees all blocks, after an interrupt anywhere in a change of queues or blocks.

        Prefixes that are written stay published.

        Args:
            others: further sequences that may hold blocks.
        """
        for sequence in dict.fromkeys([*others, *self.running, *self.waiting]):
            if sequence.finish_reason is not None:
                take_out(self.waiting, sequence)
            else:
                put(self.waiting, sequence)
                sequence.prompt_logprobs = None if sequence.scores_prompt else sequence.prompt_logprobs
            if sequence.drafting is not None:
                sequence.drafting.finish(sequence)
            sequence.cache = sequence.trail = sequence.plain_trail = None
        self.running.clear()
        self._prefixes.release_all()

    def blocks_for(self, sequence: Sequence, length: int) -> int:
        """Returns the number of blocks that a sequence of `length` tokens needs for its next step."""
        return num_blocks(length - 1 + _ahead(sequence, sequence.nodes))

    def _chunk(self, sequence: Sequence, rows: int, schedule: Schedule) -> int:
        """Adds a chunk of the prompt to the step. Returns its number of rows.

        The root runs together with the end of the prompt, unless the sequence drafts. Otherwise the steps in which it drafts
        would depend on the rows that other sequences leave.
        """
        count = min(sequence.num_missing, rows)
        with_root = 0 < sequence.num_missing < rows and not sequence.drafts and not sequence.scores_prompt
        if count <= 0 or not self._reserve(sequence, sequence.cache.length + count + with_root, schedule):
            return 0
        if with_root:
            schedule.add_tree(sequence, NOTHING, count)
        else:
            schedule.chunks.append((sequence, count))
        return count + with_root

    def _reserve(self, sequence: Sequence, length: int, schedule: Schedule) -> bool:
        """Takes the blocks that are missing for `length` tokens. Returns whether the sequence still runs."""
        if length <= len(sequence.cache.blocks) * BLOCK:
            return True
        while True:
            try:
                sequence.cache.reserve(length)
                return True
            except OutOfBlocksError:
                self.make_room(schedule)
                if sequence.cache is None:
                    return False

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence its cache, if enough blocks are free for the tokens that it has and its first tree."""
        trail, found, drafts = self._usable(sequence)
        blocks = self.pool.blocks
        idle = sum(not blocks.num_holders(block) for block in found)
        if self.running and blocks.num_free - idle < self.blocks_for(sequence, len(sequence.token_ids)) - len(found):
            return False
        put(self.running, sequence)
        take_out(self.waiting, sequence)
        blocks.share(found)
        sequence.nodes = sequence.nodes if drafts else 0
        is_new = not sequence.has_run and sequence.index == 0
        sequence.cache, sequence.has_run = self.pool.allocate(), True
        if not self._is_alone(sequence) or sequence.sampling.n > 1:  # others may find its blocks
            plain = self._trail(sequence, None)
            sequence.trail, sequence.plain_trail = trail, None if trail.last == plain.last else plain
        sequence.cache.blocks += found
        sequence.cache.length = sequence.first = len(found) * BLOCK
        if sequence.scores_prompt:
            sequence.prompt_logprobs = [None]
        if is_new:  # blocks that the request itself has written do not count
            sequence.request.num_cached = sequence.first
        if sequence.drafts and not sequence.num_missing:
            sequence.drafting.start(sequence)
        return True

    def _usable(self, sequence: Sequence) -> tuple[Trail, list[int], bool]:
        """Finds the blocks that a sequence can share, how far they are published, and whether it drafts behind them.

        A drafter that reads features also needs the features of one token behind these blocks. Where the load leaves no nodes,
        a sequence rather shares the blocks of those that do not draft, if it finds more of them. Then it does not draft either.
        """
        trail, length = self._trail(sequence, sequence.drafting), len(sequence.token_ids) - 1
        if sequence.scores_prompt:
            return trail, [], True
        found = self._prefixes.match(trail, sequence.token_ids, length - trail.beyond)
        if sequence.pace is not None and sequence.owed is None and sequence.pace.costs.least(len(self.running) + 1, 0) > 1:
            plain = self._trail(sequence, None)
            others = self._prefixes.match(plain, sequence.token_ids, length)
            if len(others) > len(found):
                return plain, others, False
        return trail, found, True

    def _trail(self, sequence: Sequence, drafting: Drafting | None) -> Trail:
        """Returns the beginning of the trail of a sequence, as it drafts in some way; None is the trail of plain decoding.

        Blocks are shared within a namespace: among requests with the same salt whose drafter writes the same keys and values.
        """
        request = sequence.request
        if drafting is not None and not (sequence.drafts and drafting.holds_tokens):
            drafting = None
        sampled = drafting is not None and sequence.sampling.temperature > 0  # each kind of requests may have its own drafter
        namespace = request.number if self._is_alone(sequence) else None, request.salt, drafting, sampled
        return Trail(namespace, beyond=int(drafting is not None and bool(drafting.drafter.feature_layers)))

    def _is_alone(self, sequence: Sequence) -> bool:
        """Whether a sequence shares blocks only with the other outputs of its request."""
        return not self._caching or sequence.sampling.prompt_logprobs is not None

    def _first_missing(self, sequence: Sequence) -> Key | None:
        """Returns the key of the first block of a waiting sequence that is not published; None if it does not fill one."""
        trail, length = self._trail(sequence, sequence.drafting), len(sequence.token_ids) - 1
        self._prefixes.match(trail, sequence.token_ids, length)
        return trail.next_key(sequence.token_ids, length)


def _soon_published(sequence: Sequence) -> Key | None:
    """Returns the key of the next block that a running sequence will publish soon, or None.

    A drafter writes the keys and values of a prompt in its first step. A prompt that is not published after that step, because
    lookup drafted instead, is not waited for.
    """
    if sequence.trail is None or sequence.records:
        return None
    return sequence.trail.next_key(sequence.token_ids, sequence.num_prompt - 1)


def _ahead(sequence: Sequence, nodes: int) -> int:
    """Returns how many positions behind the cache a step with a tree of `nodes` nodes may write."""
    return 1 + (max(nodes, sequence.drafting.drafter.ahead) if sequence.drafting is not None else 0)
