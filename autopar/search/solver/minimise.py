"""The exact core: the least `cost + price * memory` of a problem, with its repeats folded.

Nodes outside chains stand for themselves, each chain is one factor; variable elimination does the rest. A price is seconds per byte:
0 ignores memory, `inf` ignores cost (but for what is impossible). Two prices at once, one for the nodes before a place and one for
those behind, make choices that lie between the two: "k of the 32 layers shard their state".

Where memory differs between time steps (`Table.later_bytes`), it is the sum over the steps, each with its weight: with weights that are
not negative and add up to 1, what is within the limit at every step is within it in that sum, so that bounds hold. Where regions may be
computed again (`Problem.regions`), that is chosen too: of a repeat both tables are made, and the smaller entries taken.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.chain import Chain, find_chains
from autopar.search.solver.eliminate import LIMIT_ENTRIES, Eliminated, Factor, Memo, Order, eliminate, factor, find_order
from autopar.search.solver.powers import Body, ChainCost, Shape, shape_of
from autopar.search.solver.problem import Floats, Problem, Table
from autopar.search.solver.reduce import domain_sizes

Ints = NDArray[np.int64]

_KEPT_PRICES = 6
_DEAR_ENTRIES = 1e9  # about half a second
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
    again: Ints | None = None
    """Per region, 1 where it is computed again."""


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
        self.steps = 1 + max([len(table.later_bytes) for table in problem.tables], default=0)
        self.weights = (1.0,) + (0.0,) * (self.steps - 1)
        self._weighted: dict[tuple[float, ...], Minimiser] = {self.weights: self}
        self.regions = None if problem.regions is None else np.array(problem.regions, np.int64)
        self._forget()
        self._orders: dict[tuple[tuple[int, int, int], ...], tuple[Order, Order]] = {}
        chains = find_chains(self.nodes, self.edges, self.sizes, problem.segments, self.regions is not None) if fold else ()
        self.chains: list[tuple[Chain, Shape]] = []
        for chain in chains:
            shape = shape_of(chain, self.sizes)
            if self._worthwhile(chain, shape) and self._in_one_region_each(chain):
                self.chains.append((chain, shape))
        if self.chains and self._largest(self._runs_whole()) > limit_entries >= self._largest([]):
            self.chains = []
        self._flat = _Flat(problem, self.nodes, self.edges)

    def _worthwhile(self, chain: Chain, shape: Shape) -> bool:
        """Whether powers cost less than going through the repeats, within the limit on tables."""
        powers = 2 * chain.count.bit_length() * float(shape.states) ** 3 * shape.worlds
        largest = max(shape.order.largest_entries, float(shape.states) ** 2 * shape.worlds)
        return largest <= self.limit_entries and powers <= max(1e8, chain.count * shape.order.total_entries)

    def _in_one_region_each(self, chain: Chain) -> bool:
        """Whether no two rows share a region, and no row lies in two."""
        if self.regions is None:
            return True
        of_row = self.regions[chain.rows]
        first = of_row[:, 0]
        return bool((of_row == first[:, None]).all()) and (bool((first < 0).all()) or len(np.unique(first[first >= 0])) == len(first))

    def _forget(self) -> None:
        self._minima: dict[Price, Minimum] = {}
        self._tables: dict[tuple[float, bool], list[Floats]] = {}
        self._bodies: dict[tuple[int, float], Body] = {}
        self._memo = Memo()

    def weighted(self, weights: tuple[float, ...]) -> Minimiser:
        """The same with memory as the sum over the steps by these weights."""
        assert len(weights) == self.steps and abs(sum(weights) - 1.0) < 1e-9 and min(weights) >= 0
        if weights not in self._weighted:
            other = self._weighted[weights] = copy(self)
            other.weights = weights
            other._forget()
        return self._weighted[weights]

    @property
    def fits(self) -> bool:
        """Whether an order of elimination keeps all tables within the limit, so that minima are exact."""
        return self._largest(self._runs_whole()) <= self.limit_entries

    @cached_property
    def entries(self) -> float:
        """Of all tables on the way to one minimum."""
        orders = [*self._outer_order(self._runs_whole()), *[shape.order for _, shape in self.chains]]
        return sum(order.total_entries for order in orders)

    @property
    def dear(self) -> bool:
        """Whether elimination, though its tables fit, takes so long that a search is worth trying first."""
        return self.entries > _DEAR_ENTRIES

    def _largest(self, spans: list[tuple[int, int, int]]) -> float:
        return max(order.largest_entries for order in self._outer_order(spans))

    # ---- costs

    def tables(self, price: float, again: bool = False) -> list[Floats]:
        """`cost + price * memory` per table; `again`: of what is computed again."""
        if (price, again) not in self._tables:
            while len(self._tables) >= _KEPT_PRICES:
                oldest = next(iter(self._tables))
                del self._tables[oldest]
                for key in [key for key in self._bodies if key[1] == oldest[0]]:
                    del self._bodies[key]
            self._tables[price, again] = [self._priced((again and table.again) or table, price) for table in self.problem.tables]
        return self._tables[price, again]

    def _priced(self, table: Table, price: float) -> Floats:
        if price == 0:
            return table.cost_s
        memory = table.memory_bytes
        if self.weights[0] != 1.0:
            memory = np.tensordot(self.weights, np.stack(table.step_bytes), 1)
        return np.where(table.cost_s < np.inf, memory, np.inf) if price == np.inf else table.cost_s + price * memory

    def _body(self, number: int, price: float) -> Body:
        chain, shape = self.chains[number]
        modes = [self.tables(price)]
        if self.regions is not None and self.regions[chain.rows[0, 0]] >= 0:
            modes.append(self.tables(price, again=True))
        if (number, price) not in self._bodies:
            self._bodies[number, price] = Body(chain, shape, modes, self.nodes[chain.rows[0]].tolist(), self.limit_entries, self._memo)
        return self._bodies[number, price]

    def evaluate(self, choice: Ints, again: Ints | None = None) -> tuple[float, float]:
        """Cost and memory (by weights) of a choice, added up over the whole, unfolded problem."""
        cost, usage = self.usage(choice, again)
        return cost, self.weigh(usage)

    def usage(self, choice: Ints, again: Ints | None = None) -> tuple[float, Floats]:
        """Cost, and memory at every step, `(steps,)`. `again`: per region, 1 where it is computed again."""
        return self._flat.evaluate(choice, again)

    def weigh(self, usage: Floats) -> float:
        return float(usage[0]) if self.weights[0] == 1.0 else float(np.dot(self.weights, usage))

    # ---- the minimum

    def minimise(self, price: Price) -> Minimum:
        """The choice of least priced cost, known from then on. Deterministic: ties go to the lowest strategies.

        Where no table of elimination fits, or elimination is dear, the problem is shrunk and searched; the minimum is `exact` where search
        and bound meet.
        """
        found = self._minima.get(price)
        if found is None:
            found = self._minima[price] = self._minimum(price)
        return found

    def _minimum(self, price: Price) -> Minimum:
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
        sizes = self._outer_sizes(parts)
        first, second = self._outer_order(spans)
        outer = eliminate(sizes, self._outer_factors(parts, price), first, self.limit_entries, self._memo)
        ends = {v: sizes[v] for v in second.variables}
        joint, chosen = self._joint(ends, outer.rest, chains, second)
        chosen = outer.recover(chosen)
        choice = np.zeros(len(self.nodes), np.int64)
        for node, values in chosen.items():
            if node < len(choice):
                choice[node] = values[0]
        again = None if self.regions is None else np.zeros(int(self.regions.max(initial=-1)) + 1, np.int64)
        for cost in chains:
            modes = cost.recover(chosen, choice)
            if again is not None and self.regions is not None and modes.any():
                again[self.regions[cost.chain.rows[:, 0]]] = modes
        if again is not None:
            for v, values in chosen.items():
                if v >= len(self.nodes):
                    again[v - len(self.nodes)] = values[0]
        return Minimum(choice, outer.constant + joint.constant, outer.exact and joint.exact, again)

    def _searched(self, price: Price) -> Minimum:
        """The minimum by `solve_over_time` of a problem without memory, whose costs are the priced ones."""
        from autopar.search.solver.over_time import solve_over_time

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

    def _outer_sizes(self, chains: list[Chain]) -> dict[int, int]:
        """Choices of what elimination sees. Whether a region outside of chains is computed again is a variable behind the nodes."""
        sizes = {v: int(self.sizes[v]) for v in self._outer_nodes(chains)}
        return sizes | dict.fromkeys(sorted({v for scope in self._modes_outside(chains) for v in scope[-1:]}), 2)

    def _modes_outside(self, chains: list[Chain]) -> list[tuple[int, ...]]:
        """Scopes of nodes and edges outside of chains that depend on whether a region is computed again; that variable is the last."""
        if self.regions is None:
            return []
        tables, region, count = self.problem.tables, self.regions, len(self.nodes)
        found: list[tuple[int, ...]] = []
        for v in np.flatnonzero(self._outside(chains) & (region >= 0)).tolist():
            if tables[self.nodes[v]].again is not None:
                found.append((v, count + int(region[v])))
        for i, j, table in self._outer_edges(chains).tolist():
            if region[j] >= 0 and tables[table].again is not None:
                found.append((i, j, count + int(region[j])))
        return found

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
        switched = {scope[:-1]: scope[-1] for scope in self._modes_outside(chains)}
        again = self.tables(price.behind, again=True) if switched else []
        factors = []
        scopes = [((v,), int(self.nodes[v])) for v in np.flatnonzero(self._outside(chains)).tolist()]
        for scope, table in scopes + [((i, j), table) for i, j, table in self._outer_edges(chains).tolist()]:
            if scope in switched:
                factors.append(Factor((*scope, switched[scope]), np.stack([behind[table], again[table]], -1)))
            else:
                factors.append(factor(scope, (behind if scope[-1] >= price.until else before)[table]))
        return factors

    def _outer_order(self, spans: list[tuple[int, int, int]]) -> tuple[Order, Order]:
        """First the nodes that no chain touches, then those where chains end."""
        key = tuple(spans)
        if key not in self._orders:
            parts = [self.chains[number][0].part(start, stop) for number, start, stop in spans]
            sizes = self._outer_sizes(parts)
            scopes: list[tuple[int, ...]] = [(i, j) for i, j, _ in self._outer_edges(parts).tolist()]
            scopes += self._modes_outside(parts)
            wide = [(*part.entering, *part.rows[-1, list(part.leaving)].tolist(), *part.invariants) for part in parts]
            ends = {v for scope in wide for v in scope}
            first = find_order(sizes, scopes, ends)
            second = find_order({v: sizes[v] for v in sizes if v in ends}, [*first.left, *wide])
            self._orders[key] = first, second
        return self._orders[key]


class _Flat:
    """All tables of a problem in one row, those of what is computed again behind, so that a choice is evaluated by one look-up."""

    def __init__(self, problem: Problem, nodes: Ints, edges: Ints) -> None:
        tables = problem.tables
        sizes = np.array([table.cost_s.size for table in tables], np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        width = np.array([table.cost_s.shape[-1] for table in tables], np.int64)
        rows = list(tables) + ([table.again or table for table in tables] if problem.regions is not None else [])
        self.cost = np.concatenate([table.cost_s.ravel() for table in rows]) if tables else np.zeros(0)
        steps = zip(*[table.step_bytes for table in rows], strict=True)
        self.memory = [np.concatenate([held.ravel() for held in step]) for step in steps] or [np.zeros(0)]
        self.i, self.j = edges[:, 0], edges[:, 1]
        self.node_base, self.edge_base, self.edge_width = offsets[nodes], offsets[edges[:, 2]], width[edges[:, 2]]
        self.half = int(offsets[-1])
        region = np.array(problem.regions if problem.regions is not None else [-1] * len(nodes), np.int64)
        self.region = np.concatenate([region, region[self.j]])

    def evaluate(self, choice: Ints, again: Ints | None = None) -> tuple[float, Floats]:
        at = np.concatenate([self.node_base + choice, self.edge_base + choice[self.i] * self.edge_width + choice[self.j]])
        if again is not None:
            at = at + self.half * np.where(self.region >= 0, again[self.region], 0)
        return float(self.cost[at].sum()), np.array([float(memory[at].sum()) for memory in self.memory])
