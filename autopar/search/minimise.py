"""The exact core: the least `cost + price * memory` of a problem, with its repeats folded.

Nodes outside chains stand for themselves, each chain is one factor; variable elimination does the rest. A price is seconds per byte:
0 ignores memory, `inf` ignores cost (but for what is impossible). Two prices at once, one for the nodes before a place and one for
those behind, make choices that lie between the two: "k of the 32 layers shard their state".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopar.search.chain import Chain, find_chains
from autopar.search.eliminate import LIMIT_ENTRIES, Eliminated, Factor, Order, eliminate, factor, find_order
from autopar.search.powers import Body, ChainCost, Shape, shape_of
from autopar.search.problem import Floats, Problem, Table
from autopar.search.reduce import domain_sizes

Ints = NDArray[np.int64]

_KEPT_PRICES = 6
_DEAR_ENTRIES = 1e8  # about half a second
_SEARCH_S = 10.0
_SEARCH_GAP = 1e-9
_SAME = 1e-9
_TIE = 1e-12  # sums of some thousand costs are not known better


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
        self.searches = limit_entries == LIMIT_ENTRIES
        self._searched_in_vain = False
        self.search_s = _SEARCH_S  # at most, for a minimum that elimination cannot hold
        self._tables: dict[float, list[Floats]] = {}
        self._bodies: dict[tuple[int, float], Body] = {}
        self._orders: dict[tuple[tuple[int, int, int], ...], tuple[Order, Order]] = {}
        chains = find_chains(self.nodes, self.edges, self.sizes, problem.segments) if fold else ()
        self.chains: list[tuple[Chain, Shape]] = []
        for chain in chains:
            shape = shape_of(chain, self.sizes)
            if self._worthwhile(chain, shape):
                self.chains.append((chain, shape))
        if self.chains and self._largest(self._runs_whole()) > limit_entries >= self._largest([]):
            self.chains = []
        self._flat = _Flat(problem, self.nodes, self.edges)

    def _worthwhile(self, chain: Chain, shape: Shape) -> bool:
        """Whether powers cost less than going through the repeats, within the limit on tables."""
        powers = 2 * chain.count.bit_length() * float(shape.states) ** 3 * shape.worlds
        largest = max(shape.order.largest_entries, float(shape.states) ** 2 * shape.worlds)
        return largest <= self.limit_entries and powers <= max(1e8, chain.count * shape.order.total_entries)

    @property
    def fits(self) -> bool:
        """Whether an order of elimination keeps all tables within the limit, so that minima are exact."""
        return self._largest(self._runs_whole()) <= self.limit_entries

    @cached_property
    def dear(self) -> bool:
        """Whether elimination, though its tables fit, takes so long that a search is worth trying first."""
        orders = self._outer_order(self._runs_whole())
        return sum(order.total_entries for order in orders) > _DEAR_ENTRIES

    def _largest(self, spans: list[tuple[int, int, int]]) -> float:
        return max(order.largest_entries for order in self._outer_order(spans))

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
        """The choice of least priced cost. Deterministic: ties go to the lowest strategies.

        Where no table of elimination fits, or elimination is dear, the problem is shrunk and searched; the minimum is `exact` where search
        and bound meet.
        """
        if self.searches and not self.fits:
            return self._searched(price)
        if self.searches and self.dear and not self._searched_in_vain:
            found = self._searched(price)
            if found.exact:
                return found
            self._searched_in_vain = True
        spans = self._runs_whole() if price.until <= 0 else self._runs_split(price.until)
        chains = []
        for number, start, stop in spans:
            chain = self.chains[number][0].part(start, stop)
            behind = bool(chain.rows.min() >= price.until)
            chains.append(ChainCost(chain, self._body(number, price.behind if behind else price.before)))
        parts = [cost.chain for cost in chains]
        sizes = {v: int(self.sizes[v]) for v in self._outer_nodes(parts)}
        first, second = self._outer_order(spans)
        outer = eliminate(sizes, self._outer_factors(parts, price), first, self.limit_entries)
        ends = {v: sizes[v] for v in second.variables}
        joint, chosen = self._joint(ends, outer.rest, chains, second)
        chosen = outer.recover(chosen)
        choice = np.zeros(len(self.nodes), np.int64)
        for node, values in chosen.items():
            choice[node] = values[0]
        for cost in chains:
            cost.recover(chosen, choice)
        exact = outer.exact and joint.exact
        return Minimum(choice, outer.constant + joint.constant, exact)

    def _searched(self, price: Price) -> Minimum:
        """The minimum by `solve_over_time` of a problem without memory, whose costs are the priced ones."""
        from autopar.search.over_time import solve_over_time

        count = len(self.problem.tables)
        behind, before = self.tables(price.behind), self.tables(price.before)
        tables = tuple([Table(cost, t.memory_bytes) for cost, t in zip([*behind, *before], self.problem.tables * 2, strict=True)])
        nodes = tuple([t if v >= price.until else t + count for v, t in enumerate(self.problem.nodes)])
        edges = tuple([(i, j, t if j >= price.until else t + count) for i, j, t in self.problem.edges])
        found = solve_over_time(Problem(nodes, edges, tables, ()), time_limit_s=self.search_s, gap=_SEARCH_GAP)
        exact = found.cost_s - found.lower_bound_s <= _SAME * abs(found.cost_s)
        return Minimum(np.array(found.choice, np.int64), found.lower_bound_s, exact)

    def _joint(
        self, sizes: dict[int, int], rest: tuple[Factor, ...], chains: list[ChainCost], order: Order
    ) -> tuple[Eliminated, dict[int, Ints]]:
        """The minimum over the ends of chains. Chains are solved where the minimum by their bounds lies, until it lies where they are."""
        while True:
            joint = eliminate(sizes, [*rest, *[cost.factor() for cost in chains]], order, self.limit_entries)
            chosen = joint.recover({})
            solved = [cost.solve(chosen) for cost in chains]
            if not any(solved):
                return joint, chosen
            known = eliminate(sizes, [*rest, *[cost.factor(known=True) for cost in chains]], order, self.limit_entries)
            if known.constant <= joint.constant + _TIE * abs(joint.constant):
                return known, known.recover({})

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

    def _outer_nodes(self, chains: list[Chain]) -> list[int]:
        """Nodes that elimination sees: those in no chain, and the leaving nodes of each chain's last repeat."""
        outside = self._outside(chains)
        for chain in chains:
            outside[chain.rows[-1, list(chain.leaving)]] = True
        nodes: list[int] = np.flatnonzero(outside).tolist()
        return nodes

    def unfolded_order(self) -> Order:
        """An order of elimination for all nodes one by one, repeats included: each as its chain's body goes, then what is left."""
        variables: list[int] = []
        scopes: list[tuple[int, ...]] = []
        parts = [chain for chain, _ in self.chains]
        largest = total = 0.0
        for chain, shape in self.chains:
            entering = chain.entering
            for row in chain.rows.tolist():
                variables += [row[p] for p in shape.order.variables]
                leaving = tuple([row[p] for p in chain.leaving])
                scopes.append((*entering, *leaving, *chain.invariants))
                entering = leaving
            largest, total = max(largest, shape.order.largest_entries), total + chain.count * shape.order.total_entries
        gone = set(variables)
        sizes = {v: n for v, n in enumerate(self.sizes.tolist()) if v not in gone}
        rest = find_order(sizes, [*scopes, *[(i, j) for i, j, _ in self._outer_edges(parts).tolist()]])
        return Order((*variables, *rest.variables), max(largest, rest.largest_entries), total + rest.total_entries, ())

    def _outside(self, chains: list[Chain]) -> NDArray[np.bool_]:
        outside = np.ones(len(self.nodes), np.bool_)
        for chain in chains:
            outside[chain.rows.ravel()] = False
        return outside

    def _outer_edges(self, chains: list[Chain]) -> Ints:
        free = np.ones(len(self.edges), np.bool_)
        for chain in chains:
            free[chain.edges.ravel()] = False
        return self.edges[free]

    def _outer_factors(self, chains: list[Chain], price: Price) -> list[Factor]:
        behind, before = self.tables(price.behind), self.tables(price.before)
        factors = [
            factor((v,), (behind if v >= price.until else before)[self.nodes[v]]) for v in np.flatnonzero(self._outside(chains)).tolist()
        ]
        for i, j, table in self._outer_edges(chains).tolist():
            factors.append(factor((i, j), (behind if j >= price.until else before)[table]))
        return factors

    def _outer_order(self, spans: list[tuple[int, int, int]]) -> tuple[Order, Order]:
        """First the nodes that no chain touches, then those where chains end."""
        key = tuple(spans)
        if key not in self._orders:
            parts = [self.chains[number][0].part(start, stop) for number, start, stop in spans]
            sizes = {v: int(self.sizes[v]) for v in self._outer_nodes(parts)}
            scopes: list[tuple[int, ...]] = [(i, j) for i, j, _ in self._outer_edges(parts).tolist()]
            wide = [(*part.entering, *part.rows[-1, list(part.leaving)].tolist(), *part.invariants) for part in parts]
            ends = {v for scope in wide for v in scope}
            first = find_order(sizes, scopes, ends)
            second = find_order({v: sizes[v] for v in sizes if v in ends}, [*first.left, *wide])
            self._orders[key] = first, second
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
