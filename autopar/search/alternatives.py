"""What every parameter's other storages would have cost: the best plan in which its row of the plan is stored so.

Each is a search of its own on the same mesh, with one row restricted; that is why they are made on request only.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.ir import folded_names, units
from autopar.ir.assignment import Storage
from autopar.ir.conversion import State
from autopar.ir.plan import Alternative, Plan
from autopar.search.build import Built
from autopar.search.solver.solve import restrict, solve, solve_with


def price_alternatives(plan: Plan, built: Built, limit_bytes: float) -> Plan:
    """`plan` with the alternatives of every parameter row that differ from it on one axis.

    `limit_bytes` is for what adds up: what it leaves of the plan's limit is workspace, which counts in the memory of an alternative too.
    """
    workspace = plan.predicted.memory_limit_bytes - limit_bytes
    node_of = {item.fqn: built.structure.node_of_parameter[index] for index, item in enumerate(built.structure.graph.parameters)}
    rows = []
    for row in plan.parameters:
        nodes = [node_of[name] for name in folded_names.expand(row.name)]
        options = [option for option in built.options[nodes[0]] if isinstance(option, Storage)]
        chosen = tuple(row.stored.values())
        others = dict.fromkeys(option.stored for option in options if _differs_on_one_axis(option.stored, chosen))
        found = [_price(built, nodes, state, limit_bytes, workspace) for state in others]
        rows.append(row.model_copy(update={"alternatives": tuple(found)}))
    return plan.model_copy(update={"parameters": tuple(rows)})


def _differs_on_one_axis(state: State, chosen: tuple[str, ...]) -> bool:
    return sum(str(placement) != text for placement, text in zip(state, chosen, strict=True)) == 1


def _price(built: Built, nodes: list[int], state: State, limit_bytes: float, workspace_bytes: float) -> Alternative:
    """The best plan with the parameters at `nodes` stored in `state`."""
    stored = dict(zip(built.costs.names, map(str, state), strict=True))
    allowed: dict[int, tuple[int, ...]] = {}
    for node in nodes:
        options = enumerate(built.options[node])
        allowed[node] = tuple(number for number, option in options if isinstance(option, Storage) and option.stored == state)
        if not allowed[node]:
            return Alternative(stored=stored, why="no operation of one of the repeats can use it so")
    problem = replace(built.problem, memory_limit_bytes=limit_bytes)
    solution = solve_with(problem, allowed)
    if not solution.feasible:
        # The cheapest is too large: the limit has a say.
        solution = solve(restrict(problem, allowed))
    memory = int(solution.memory_bytes + workspace_bytes)
    if not solution.feasible:
        return Alternative(
            stored=stored, memory_bytes=memory, why=f"needs {units.size(solution.memory_bytes - limit_bytes)} more than there are"
        )
    return Alternative(stored=stored, cost_s=solution.cost_s, memory_bytes=memory)
