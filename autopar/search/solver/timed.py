"""`search_timed`: choices within the memory of every time step, from the dual's prices and forest moves, until time or gap is up."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from autopar.search.solver.arrays import Arrays, lay_out
from autopar.search.solver.compiled import generator
from autopar.search.solver.dual import Dual
from autopar.search.solver.hurry import hurry
from autopar.search.solver.incumbent import Progress
from autopar.search.solver.last_resort import least_cost, least_memory
from autopar.search.solver.possible import Possible
from autopar.search.solver.problem import Ints, Problem, Solution
from autopar.search.solver.walker import Best, Walker
from autopar.search.solver.warm import loading

if TYPE_CHECKING:
    from autopar.search.solver.finish import Finish

__all__ = ["search_timed"]

_DUAL_ENTRIES = 60_000_000  # table entries that the dual's steps between two looks at the time may read, about
_FEWEST_STEPS, _MOST_STEPS = 5, 50
_STALLED = 1e-5  # of the bound: less in `_MOST_STEPS` steps is not worth a thread of its own
_REPAIR = 4.0  # times the highest price is about what it costs to bring a rounding's memory down
_MOVES_PER_STEP = 3  # of a walk take about as long as one step of the dual
_ROUNDS_BEFORE_FINISH = 10  # of walks, before what is left open is given to an integer program; after each that was in vain, twice as many
_PRESSED = 10  # rounds with a possible choice that is over the limit, before memory is worth more than cost
_LONGEST_BLIND = 300  # steps of the dual without a possible choice to round to
_LATE = 0.5  # of the time: when nothing fits by then, walks begin at what holds least
_GRACE_S = 0.5  # beyond the time limit, where nothing that fits is known yet
_LOADING_S = 2.0  # at least, for compiled code to be read
_IDLE_ROUNDS = 200  # without a better choice: the end where no time limit is given


@dataclass
class _Clock:
    """Seconds since the start, and whether they are up."""

    limit_s: float | None
    start: float = field(default_factory=perf_counter)

    @property
    def seconds(self) -> float:
        return perf_counter() - self.start

    @property
    def left_s(self) -> float | None:
        return None if self.limit_s is None else max(0.0, self.limit_s - self.seconds)

    @property
    def part(self) -> float:
        """The part of the time that is over."""
        return 0.0 if self.limit_s is None else self.seconds / max(self.limit_s, 1e-9)

    @property
    def up(self) -> bool:
        return self.limit_s is not None and self.seconds >= self.limit_s


def search_timed(
    problem: Problem,
    *,
    time_limit_s: float | None = None,
    seed: int = 0,
    gap: float = 0.0,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """Search until `time_limit_s`, until cost and bound differ by at most `gap` of the bound, or until nothing is found for long.

    No edge may hold memory. The same seed gives the same answer where the limit is
    not what stops it. Ctrl-C ends the search with the best choice so far. `feasible` of the solution is False
    where no choice within the limit was found: then the choice is the one that was over it by least, and the bound is `inf` if it is
    proven that there is none.
    """
    clock = _Clock(time_limit_s)
    arrays = lay_out(problem)
    least = least_memory(arrays)
    bound, price = least_cost(arrays), 0.0
    ready = loading()
    ready.join(None if time_limit_s is None else max(clock.left_s or 0.0, _LOADING_S))
    choice = least
    if not ready.is_alive():
        search = _Search(arrays, least, clock, seed, gap, progress)
        try:
            search.run()
        except KeyboardInterrupt:
            if search.best.choice is None:
                raise
            search.best.offer(least)  # counts where nothing that fits was known
        choice = search.best.choice if search.best.choice is not None else search.dual.choice
        bound, price = search.bound, float(search.dual.best_prices.sum())
    picked = tuple(choice.tolist())
    cost, memory = problem.evaluate(picked)
    feasible = cost < np.inf and memory <= problem.memory_limit_bytes
    return Solution(picked, cost, memory, min(bound, cost) if feasible else bound, feasible, price)


class _Search:
    """The dual, the best choice and the walks of one search, in rounds.

    In each round the dual takes some steps, or a walk a number of moves, on two threads; what they found is looked at when both are
    done, in the same order always.
    """

    def __init__(
        self, arrays: Arrays, least: Ints, clock: _Clock, seed: int, gap: float, progress: Callable[[Progress], None] | None
    ) -> None:
        self.arrays, self.least, self.clock, self.gap, self.progress = arrays, least, clock, gap, progress
        self.seed = seed
        self.finish: Finish | None = None
        self.next_finish = _ROUNDS_BEFORE_FINISH
        self.proven = -np.inf
        self.best = Best(arrays)
        self.dual = Dual(arrays)
        self.best.offer(self.dual.choice)
        self.rounded = Best(arrays)
        self.state = generator(seed)
        self.walkers = [Walker(arrays, generator(seed + 1 + number)) for number in range(2)]
        self.steps = max(_FEWEST_STEPS, min(_MOST_STEPS, _DUAL_ENTRIES // max(self.walkers[0].entries, 1)))

    @cached_property
    def possible(self) -> Possible:
        """Made when it is needed: it has a table of its own, as large as the problem's."""
        return Possible(self.arrays, self.least, generator(self.seed + 3))

    @property
    def bound(self) -> float:
        """The higher of the dual's bound and the integer program's."""
        return max(self.dual.bound, self.proven)

    @property
    def done(self) -> bool:
        if self.bound == np.inf or (self.best.excess == 0 and self.best.cost - self.bound <= self.gap * abs(self.bound)):
            return True
        return self.clock.up

    def run(self) -> None:
        """Rounds until the end. While the bound grows, the dual has one of the two threads; later what is left open, if that is little."""
        with ThreadPoolExecutor(2) as threads:
            try:
                self._raise_bound()
                self.best.offer(self.rounded.choice if self.rounded.choice is not None else self.dual.choice)
                self._report("bound")
                self._rounds(threads)
                if self.best.excess > 0 and self.bound < np.inf:
                    self._hurry()
            finally:
                if self.finish is not None:
                    self.finish.stop()
                    self._finished()

    def _rounds(self, threads: ThreadPoolExecutor) -> None:
        idle, rounds, over, steps, before, rising, longest_s = 0, 0, 0, self.steps, -np.inf, True, 0.0
        while not self.done and (self.clock.limit_s is not None or idle < _IDLE_ROUNDS):
            walkers = self.walkers[1:] if rising or self._finishing else self.walkers
            repeats = max(1, _MOVES_PER_STEP * self.steps // self.walkers[0].moves) if rising else 1
            late = self.best.excess > 0 and self.clock.part > _LATE
            if late:
                self.best.offer(self.least if self.possible.choice is None else self.possible.choice)
            for walker in walkers:
                walker.prepare(self.best, self.rounded, self.dual, rising, over > _PRESSED)
            jobs = [threads.submit(self._raise_bound)] if rising else []
            before_s = self.clock.seconds
            share = self._share(longest_s)
            jobs += [threads.submit(walker.walk, share * repeats) for walker in walkers if walker.ready]
            if self.best.choice is None or late:
                jobs.append(threads.submit(self.possible.walk))
            for job in jobs:
                job.result()
            longest_s = max(0.9 * longest_s, self.clock.seconds - before_s)
            over = over + 1 if self.best.excess > 0 and self.best.choice is not None else 0
            if self.best.choice is None:
                self._look_for_a_possible(threads, rising)
            found = [self.best.offer(choice) for choice in self._found(walkers, rising)]
            idle = 0 if any(found) or rising else idle + 1
            if rising:
                steps += self.steps
                if steps % _MOST_STEPS < self.steps:
                    grows = self.dual.bound - before > _STALLED * abs(self.dual.bound)
                    rising = grows or (self.best.choice is None and steps < _LONGEST_BLIND)
                    before = self.dual.bound
            else:
                rounds += 1
                self._look_at_the_rest(threads, rounds)
            self._report("bound" if rising else "moves")

    def _share(self, longest_s: float) -> float:
        """The part of a round for which there is time: less than 1 in the last, which is not to go on beyond the limit."""
        left = self.clock.left_s
        return 1.0 if left is None or left > longest_s else left / longest_s

    def _hurry(self) -> None:
        """Time is up or the search at its end and nothing that fits is known: take what holds least, and what a moment makes of it."""
        limit = self.clock.limit_s
        end_s = np.inf if limit is None else max(limit, self.clock.seconds) + _GRACE_S
        byte_price = float(self.dual.best_prices.max(initial=0.0))
        for choice in hurry(self.arrays, self.possible, self.best.choice, byte_price, self.state):
            self.best.offer(choice)
            if self.clock.seconds > end_s:
                break
        self._report("last resort")

    def _look_at_the_rest(self, threads: ThreadPoolExecutor, rounds: int) -> None:
        """Begin the integer program after some rounds of walks, when the best choice is good; see whether it has ended.

        It begins again when the best choice has become better meanwhile: what was too much may be little enough by then.
        Where there is no time limit, its end is waited for: then when it ends is not by chance.
        """
        if rounds >= self.next_finish and not self._finishing:
            self.next_finish = 2 * rounds
            left_s = self.clock.left_s
            if self.finish is None or self.best.cost < self.finish.cost:
                from autopar.search.solver.finish import LEAST_S, Finish, rest  # CP-SAT takes a while to import

                program = None if left_s is not None and left_s < LEAST_S else rest(self.arrays, self.dual, self.best)
                cost = self.best.cost if self.best.excess == 0 else np.inf
                self.finish = Finish(program, cost, threads, left_s, self.seed)
        if self.finish is not None and self.finish.poll(wait=self.clock.limit_s is None):
            self._finished()

    def _finished(self) -> None:
        assert self.finish is not None
        if self.finish.choice is not None:
            self.best.offer(self.finish.choice)
        self.proven = max(self.proven, self.finish.bound)

    @property
    def _finishing(self) -> bool:
        return self.finish is not None and self.finish.running

    def _raise_bound(self) -> None:
        self.rounded = Best(self.arrays, _REPAIR * float(self.dual.best_prices.max(initial=0.0)))
        for _ in range(self.steps):
            if self.clock.up:
                return
            self.dual.step()
            self.rounded.offer(self.dual.choice)

    def _look_for_a_possible(self, threads: ThreadPoolExecutor, rising: bool) -> None:
        """Take the possible choice that moves have come to; after some rounds in vain, ask CP-SAT for one, when it has a thread."""
        if self.possible.choice is not None:
            self.best.offer(self.possible.choice)
        elif self.finish is None and not rising:
            from autopar.search.solver.finish import Finish
            from autopar.search.solver.pairs import pairs

            self.finish = Finish(pairs(self.arrays, self.possible.nearest), np.inf, threads, self.clock.left_s, self.seed)
        if self.finish is not None and self.finish.poll(wait=self.clock.limit_s is None):
            self._finished()

    def _found(self, walkers: list[Walker], rising: bool) -> list[Ints]:
        found = [walker.found for walker in walkers if walker.ready]
        return [*found, self.rounded.choice] if rising and self.rounded.choice is not None else found

    def _report(self, phase: str) -> None:
        if self.progress is not None:
            cost, bound = self.best.cost if self.best.excess == 0 else np.inf, self.bound
            gap = (cost - bound) / abs(bound) if cost > bound and bound != 0 else 0.0
            self.progress(Progress(phase, cost, bound, gap, self.clock.seconds))
