"""Decodes counted one by one, step after step: the reference for ``decodes.JumpingDecodes``.

Every branch is an object with its own token count, its own blocks and the time of each of its
tokens. Nothing is derived from a clock, nothing is summed in advance, and no step is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fxgraft.runtime.hermes.llm.blocks import blocks_for
from fxgraft.runtime.hermes.llm.decodes import NEVER, Decodes, decode_blocks
from fxgraft.runtime.hermes.request import Request


@dataclass(slots=True)
class Branch:
    """One query: tokens emitted of those wanted, and when the last one came."""

    request: Request
    output: int
    emitted: int
    last: float
    largest: float = 0.0
    times: list[float] = field(default_factory=list[float])

    @property
    def kept(self) -> int:
        """Tokens in blocks of its own; a single path goes on in the prompt's."""
        own = self.emitted - 1
        return own if self.request.branch_outputs else own + self.request.prompt


class ListedDecodes(Decodes):
    """Decodes as a list of branches; a jump is always one step."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.branches: list[Branch] = []

    def join(self, request: Request) -> None:
        """Add a branch for each output that is not complete."""
        request.base, request.joined = request.emitted, self.clock
        self.branches += [
            Branch(request, output, request.emitted, request.last_token)
            for output in request.outputs()
            if output > request.emitted
        ]
        self._recount()

    def _recount(self) -> None:
        self.count = len(self.branches)
        self.due = sum(map(self._needed, self.branches))
        left = min((branch.output - branch.emitted for branch in self.branches), default=NEVER)
        self.next_end = self.clock + left
        self.context = sum(branch.request.prompt + branch.emitted for branch in self.branches)

    def _of(self, request: Request) -> list[Branch]:
        return [branch for branch in self.branches if branch.request is request]

    def drop(self, request: Request) -> None:
        """Remove its branches."""
        self.sync(request)
        self.branches = [branch for branch in self.branches if branch.request is not request]
        self._recount()

    def needed_by(self, request: Request) -> int:
        """Its branches whose last block is full."""
        return sum(map(self._needed, self._of(request)))

    def _needed(self, branch: Branch) -> int:
        """Blocks for its next token."""
        return 0 if branch.kept % self.block_size else branch.request.kv_layers

    def held_by(self, request: Request) -> int:
        """Blocks of its branches and of its prompt."""
        branches = self._of(request)
        own = sum(blocks_for(branch.kept, self.block_size) for branch in branches)
        if request.branch_outputs:
            own += blocks_for(request.prompt, self.block_size)
        own *= request.kv_layers
        assert own == decode_blocks(request, branches[0].emitted, self.block_size)
        return own

    def emitted_by(self, request: Request) -> int:
        """By its first branch; all advance together."""
        return self._of(request)[0].emitted

    def keep_layers(self, request: Request, layers: int) -> int:
        """Count again."""
        before = self.held_by(request)
        request.kv_layers = layers
        self._recount()
        return before - self.held_by(request)

    def jump(self, free: int, limit: int) -> int:
        """Always one step."""
        return 1

    def allocate(self, steps: int) -> int:
        """A block for each branch whose last one is full."""
        return self.due

    def advance(
        self, steps: int, start: float, first: float, slope: float, end: float
    ) -> tuple[float, int]:
        """Each branch gets a token and logs its gap."""
        assert steps == 1
        for branch in self.branches:
            gap = end - branch.last
            branch.largest = max(branch.largest, gap)
            branch.last = end
            branch.emitted += 1
            branch.times.append(end)
            if self._rows is not None:
                self._rows.append((self._client, gap, 1))
        self.clock += 1
        self.last_end = end
        self._recount()
        return 0.0, 0

    def ended(self, now: float) -> list[tuple[Request, int, bool]]:
        """Branches with all their tokens."""
        done = [branch for branch in self.branches if branch.emitted >= branch.output]
        done.sort(key=lambda branch: branch.request.index)
        found: list[tuple[Request, int, bool]] = []
        for branch in done:
            request = branch.request
            freed = blocks_for(branch.kept, self.block_size)
            self.branches.remove(branch)
            self._fold(branch)
            request.emitted = branch.emitted
            request.live -= 1
            if request.live == 0:
                request.last_token = now
                if request.branch_outputs:
                    freed += blocks_for(request.prompt, self.block_size)
            found.append((request, freed * request.kv_layers, request.live == 0))
        self._recount()
        return found

    def _fold(self, branch: Branch) -> None:
        branch.request.max_gap = max(branch.request.max_gap, branch.largest)

    def sync(self, request: Request) -> None:
        """From its branches."""
        for branch in self._of(request):
            self._fold(branch)
            request.emitted = branch.emitted
            request.last_token = branch.last

    def pending_output(self) -> int:
        """Added up."""
        return sum(branch.output - branch.emitted for branch in self.branches)
