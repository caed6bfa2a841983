"""Cost of a search in an IVF-PQ index (RAGO, arXiv 2503.14649; spec section 6.2)."""

from __future__ import annotations

from dataclasses import dataclass

OVERHEAD = 1.1
"""Memory of an index over its payload."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Operations and bytes of one phase of a search."""

    operations: float
    bytes: float


@dataclass(frozen=True, slots=True)
class IvfPq:
    """An index and the processor that searches it.

    Attributes:
        dimension: of a vector.
        centroids: lists of the index.
        probes: lists that a query scans.
        vectors_per_list: mean length of a list.
        subquantizers: codes per vector.
        candidates: vectors that are ranked again exactly; 0 for none.
        flops: operations per second.
        bandwidth: bytes per second of memory.
        code_bits: of a code.
        overlap: whether computing and reading overlap inside a phase.
        groups: of centroids, if those are searched in two levels; 0 for one level.
        group_probes: groups that a query looks into.
    """

    dimension: int
    centroids: int
    probes: int
    vectors_per_list: int
    subquantizers: int
    flops: float
    bandwidth: float
    candidates: int = 0
    code_bits: int = 8
    overlap: bool = False
    groups: int = 0
    group_probes: int = 1

    def phases(self, batch: int = 1) -> dict[str, Phase]:
        """Operations and bytes of a batch of queries, by phase."""
        width, probes = self.dimension, self.probes
        codes, vectors = 1 << self.code_bits, probes * self.vectors_per_list
        coarse = Phase(
            batch * 2 * width * self.centroids,
            batch * (4 * width + 8 * probes) + 4 * self.centroids * width,
        )
        if self.groups:
            seen = self.group_probes * self.centroids / self.groups
            coarse = Phase(
                batch * 2 * width * (self.groups + seen),
                batch * (4 * width + 8 * probes + 4 * seen * width) + 4 * self.groups * width,
            )
        tables = 2 * codes * self.subquantizers * 4
        scan = Phase(
            batch * self.subquantizers * vectors,
            batch * (vectors * self.subquantizers * self.code_bits / 8 + 4 * self.candidates
                     + tables) + codes * width * 4,
        )  # fmt: skip
        found = {"coarse": coarse, "scan": scan}
        if self.candidates:
            found["rerank"] = Phase(
                batch * 2 * width * self.candidates,
                batch * (4 * self.candidates * width + 4 * self.candidates),
            )
        return found

    def seconds(self, batch: int = 1) -> float:
        """Time of a batch of queries."""
        times = [
            (phase.operations / self.flops, phase.bytes / self.bandwidth)
            for phase in self.phases(batch).values()
        ]
        return sum(max(pair) if self.overlap else sum(pair) for pair in times)

    @property
    def memory(self) -> float:
        """Bytes of the index."""
        vectors = self.centroids * self.vectors_per_list
        return OVERHEAD * (
            vectors * (self.subquantizers * self.code_bits / 8 + 24)
            + 4 * self.centroids * self.dimension
            + (1 << self.code_bits) * 4 * self.dimension
        )


def hnsw_memory(dimension: int, neighbours: int, vectors: int) -> float:
    """Bytes of an HNSW index, for comparison."""
    return OVERHEAD * (4 * dimension + 8 * neighbours) * vectors
