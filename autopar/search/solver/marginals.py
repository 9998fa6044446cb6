"""Min-marginals: for every strategy of every node, the least priced cost of all choices that contain it.

One elimination upwards and one pass downwards over the same tables give all of them (Dechter 1999; Cowell et al. 1999, ch. 6). A strategy
whose marginal is over the cost of a known choice is in no better one and can go: reduced-cost fixing, with the strongest costs
there are.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from autopar.search.solver.eliminate import Eliminated, Factor, eliminate, factor, find_order
from autopar.search.solver.minimise import Minimiser
from autopar.search.solver.problem import Floats

Ints = NDArray[np.int64]


def min_marginals(minimiser: Minimiser, price: float) -> list[Floats] | None:
    """Per node the least `cost + price * memory` of all choices with each of its strategies; unfolded, exact.

    None where the tables would not fit.
    """
    tables = minimiser.tables(price)
    sizes = {v: int(n) for v, n in enumerate(minimiser.sizes.tolist())}
    factors = [factor((v,), tables[t]) for v, t in enumerate(minimiser.nodes.tolist())]
    factors += [Factor((i, j), tables[t]) for i, j, t in minimiser.edges.tolist()]
    order = minimiser.unfolded_order()
    if order.largest_entries > minimiser.limit_entries:
        return None
    return _downwards(eliminate(sizes, factors, order, minimiser.limit_entries), sizes)


def _downwards(done: Eliminated, sizes: dict[int, int]) -> list[Floats]:
    """Marginals from the factors of each step: what a step passed up comes back as what all the rest adds to it."""
    from_step = {id(message): variable for variable, message in done.messages.items()}
    above: dict[int, Factor] = {}
    constants = [(variable, float(message.table)) for variable, message in done.messages.items() if not message.variables]
    total = done.constant
    marginals: dict[int, Floats] = {}
    for variable, factors in reversed(done.steps):
        message = done.messages[variable]
        if not message.variables:
            rest = total - message.table if np.isfinite(total) else sum(c for v, c in constants if v != variable)
            above[variable] = Factor((), np.asarray(rest, float))
        known = [*factors, above.pop(variable)]
        marginals[variable] = _least(known, (variable,), sizes)
        for item in factors:
            child = from_step.get(id(item))
            if child is not None:
                others = [other for other in known if other is not item]
                above[child] = Factor(item.variables, _least(others, item.variables, sizes))
    return [marginals[v] for v in sorted(marginals)]


def _least(factors: list[Factor], keep: tuple[int, ...], sizes: dict[int, int]) -> Floats:
    """The sum of `factors`, minimised over all variables but `keep`."""
    scopes = [item.variables for item in factors]
    here = {v: sizes[v] for v in sorted(set(keep).union(*scopes))}
    return eliminate(here, factors, find_order(here, scopes, keep), sys.maxsize).table(keep, here)
