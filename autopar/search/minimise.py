"""The exact core: the least `cost + price * memory` of a problem, with its repeats folded.

Nodes outside chains stand for themselves, each chain is one factor; variable elimination does the rest. A price is seconds per byte:
0 ignores memory, `inf` ignores cost (but for what is impossible). Two prices at once, one for the nodes before a place and one for
those behind, make choices that lie between the two: "k of the 32 layers shard their state".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.search.chain import Body, Chain, Power, Shape, chain_factor, find_chains, recover_chain, shape_of
from autopar.search.eliminate import LIMIT_ENTRIES, Factor, Order, eliminate, factor, find_order
from autopar.search.problem import Floats, Problem
from autopar.search.reduce import domain_sizes

Ints = NDArray[np.int64]

_KEPT_PRICES = 6


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds per byte: `before` for nodes with a number below `until`, `behind` for the others."""

    behind: float
    before: float = 0.0
    until: int = 0


@dataclass(frozen=True, slots=True)
class Minimum:
    """A choice per node, and `bound`: no choice has a lower priced cost. The choice reaches it when `exact`."""

    choice: Ints
    bound: float
    exact: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """A chain under one price."""

    chain: Chain
    body: Body
    shape: Shape


class Minimiser:
    """A problem made ready to be minimised at many prices.

    `fold=False` ignores the segments. `limit_entries` bounds the size of a table; where no order of elimination keeps below it the
    minimum is a lower bound and `exact` is False.
    """

    def __init__(self, problem: Problem, fold: bool = True, limit_entries: int = LIMIT_ENTRIES) -> None:
        self.problem = problem
        self.nodes = np.array(problem.nodes, np.int64)
        self.edges = np.array(problem.edges, np.int64).reshape(-1, 3)
        self.sizes = domain_sizes(problem)
        self.limit_entries = limit_entries
        self._tables: dict[float, list[Floats]] = {}
        self._bodies: dict[tuple[int, float], Body] = {}
        self._orders: dict[tuple[tuple[int, int, int], ...], Order] = {}
        chains = find_chains(self.nodes, self.edges, self.sizes, problem.segments) if fold else ()
        self.chains: list[tuple[Chain, Shape]] = []
        for chain in chains:
            shape = shape_of(chain, self.sizes)
            if self._worthwhile(chain, shape):
                self.chains.append((chain, shape))
        if self.chains and self._outer_order(self._runs_whole()).largest_entries > limit_entries:
            folded, self.chains = self.chains, []
            if self._outer_order([]).largest_entries > limit_entries:
                self.chains = folded
        self._flat = _Flat(problem, self.nodes, self.edges)

    def _worthwhile(self, chain: Chain, shape: Shape) -> bool:
        """Whether powers cost less than going through the repeats, within the limit on tables."""
        powers = 2 * chain.count.bit_length() * float(shape.states) ** 3 * shape.worlds
        largest = max(shape.order.largest_entries, float(shape.states) ** 2 * shape.worlds)
        return largest <= self.limit_entries and powers <= max(1e8, chain.count * shape.order.total_entries)

    # ---- costs

    def tables(self, price: float) -> list[Floats]:
        """`cost + price * memory` per table."""
        if price not in self._tables:
            while len(self._tables) >= _KEPT_PRICES:
                oldest = next(iter(self._tables))
                del self._tables[oldest]
                for key in [key for key in self._bodies if key[1] == oldest]:
                    del self._bodies[key]
            if price == 0:
                self._tables[price] = [table.cost_s for table in self.problem.tables]
            elif price == np.inf:
                self._tables[price] = [np.where(t.cost_s < np.inf, t.memory_bytes, np.inf) for t in self.problem.tables]
            else:
                self._tables[price] = [table.cost_s + price * table.memory_bytes for table in self.problem.tables]
        return self._tables[price]

    def _body(self, number: int, price: float) -> Body:
        tables = self.tables(price)
        if (number, price) not in self._bodies:
            chain, shape = self.chains[number]
            unary = self.nodes[chain.rows[0]].tolist()
            self._bodies[number, price] = Body(chain, shape, tables, unary, self.limit_entries)
        return self._bodies[number, price]

    def evaluate(self, choice: Ints) -> tuple[float, float]:
        """Cost and memory of a choice, added up over the whole, unfolded problem."""
        return self._flat.evaluate(choice)

    # ---- the minimum

    def minimise(self, price: Price) -> Minimum:
        """The choice of least priced cost. Deterministic: ties go to the lowest strategies."""
        spans = self._runs_whole() if price.until <= 0 else self._runs_split(price.until)
        runs = []
        for number, start, stop in spans:
            chain, shape = self.chains[number]
            behind = bool(chain.rows[start:stop].min() >= price.until)
            runs.append(_Run(chain.part(start, stop), self._body(number, price.behind if behind else price.before), shape))
        powers = [run.body.power(run.chain.count) for run in runs]
        factors = self._outer_factors(runs, price)
        factors += [chain_factor(run.chain, run.shape, power) for run, power in zip(runs, powers, strict=True)]
        sizes = {v: int(self.sizes[v]) for v in self._outer_nodes(runs)}
        result = eliminate(sizes, factors, (), self._outer_order(spans), self.limit_entries)
        return Minimum(self._recover(result.recover({}), runs, powers), float(result.table), result.exact)

    def _recover(self, outer: dict[int, Ints], runs: list[_Run], powers: list[Power]) -> Ints:
        choice = np.zeros(len(self.nodes), np.int64)
        for node, chosen in outer.items():
            choice[node] = chosen[0]
        for run, power in zip(runs, powers, strict=True):
            recover_chain(run.chain, run.shape, power, choice)
        return choice

    def _runs_whole(self) -> list[tuple[int, int, int]]:
        return [(number, 0, chain.count) for number, (chain, _) in enumerate(self.chains)]

    def _runs_split(self, until: int) -> list[tuple[int, int, int]]:
        """`(chain, start, stop)` so that all nodes of a run lie on one side of node `until`."""
        spans = []
        for number, (chain, _) in enumerate(self.chains):
            low, high = chain.rows.min(1), chain.rows.max(1)
            for side in (high < until, low >= until):
                rows = np.flatnonzero(side)
                if len(rows) > 1:
                    spans.append((number, int(rows[0]), int(rows[-1]) + 1))
        return spans

    def _outer_nodes(self, runs: list[_Run]) -> list[int]:
        """Nodes that elimination sees: those in no run, and the leaving nodes of each run's last repeat."""
        outside = self._outside(runs)
        for run in runs:
            outside[run.chain.rows[-1, list(run.chain.leaving)]] = True
        nodes: list[int] = np.flatnonzero(outside).tolist()
        return nodes

    def _outside(self, runs: list[_Run]) -> NDArray[np.bool_]:
        outside = np.ones(len(self.nodes), np.bool_)
        for run in runs:
            outside[run.chain.rows.ravel()] = False
        return outside

    def _outer_edges(self, runs: list[_Run]) -> Ints:
        free = np.ones(len(self.edges), np.bool_)
        for run in runs:
            free[run.chain.edges.ravel()] = False
        return self.edges[free]

    def _outer_factors(self, runs: list[_Run], price: Price) -> list[Factor]:
        behind, before = self.tables(price.behind), self.tables(price.before)
        factors = [
            factor((v,), (behind if v >= price.until else before)[self.nodes[v]]) for v in np.flatnonzero(self._outside(runs)).tolist()
        ]
        for i, j, table in self._outer_edges(runs).tolist():
            factors.append(factor((i, j), (behind if j >= price.until else before)[table]))
        return factors

    def _outer_order(self, spans: list[tuple[int, int, int]]) -> Order:
        key = tuple(spans)
        if key not in self._orders:
            parts = [self.chains[number][0].part(start, stop) for number, start, stop in spans]
            runs = [_Run(part, None, None) for part in parts]  # type: ignore[arg-type]
            sizes = {v: int(self.sizes[v]) for v in self._outer_nodes(runs)}
            scopes = [(i, j) for i, j, _ in self._outer_edges(runs).tolist()]
            wide = [(*part.entering, *part.rows[-1, list(part.leaving)].tolist(), *part.invariants) for part in parts]
            self._orders[key] = find_order(sizes, [*scopes, *wide])
        return self._orders[key]


class _Flat:
    """All tables of a problem in one row, so that a choice is evaluated by one look-up."""

    def __init__(self, problem: Problem, nodes: Ints, edges: Ints) -> None:
        tables = problem.tables
        sizes = np.array([table.cost_s.size for table in tables], np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        width = np.array([table.cost_s.shape[-1] for table in tables], np.int64)
        self.cost = np.concatenate([table.cost_s.ravel() for table in tables]) if tables else np.zeros(0)
        self.memory = np.concatenate([table.memory_bytes.ravel() for table in tables]) if tables else np.zeros(0)
        self.i, self.j = edges[:, 0], edges[:, 1]
        self.node_base, self.edge_base, self.edge_width = offsets[nodes], offsets[edges[:, 2]], width[edges[:, 2]]

    def evaluate(self, choice: Ints) -> tuple[float, float]:
        at = np.concatenate([self.node_base + choice, self.edge_base + choice[self.i] * self.edge_width + choice[self.j]])
        return float(self.cost[at].sum()), float(self.memory[at].sum())
