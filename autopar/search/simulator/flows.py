"""Tasks in an order, on links that they share: the simulator's clock.

A task starts when all tasks before it have ended. Computing and communication go on at their own pace:

* A flow that is alone on its links takes its own time. Let a flow take the share `s` of a link's end (1 unless told otherwise); a link's
  load is the sum of the shares of the flows that are on it, and a flow goes at `1 / max(1, load of its most loaded link)` of its speed.
  So flows that want the same link share it evenly, no link carries more than it can, and one that wants more than the link has (one
  sender for two receivers) is as slow as that makes it. After the fluid models of network simulators (Casanova et al. 2014, SimGrid).
* While anything arrives at a group beside its computing, that computing goes at `1 - felt_share` of its speed
  (`autopar.ir.cluster.Device.felt_share`); at 1 it stands still.

Time moves from one end of a task to the next; only tasks whose speed a start or an end changes are looked at.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf

from autopar.search.simulator.workload import Links


class Tasks:
    """A step as a graph of tasks. `add` them in an order in which each comes after what it waits for, then `run` once.

    `start_s` and `end_s` hold the times afterwards, by the number that `add` returned.
    """

    def __init__(self, felt_share: float) -> None:
        self.felt_share = felt_share
        self.work_s: list[float] = []
        self.links: list[tuple[tuple[int, float], ...]] = []
        self.computes: list[int] = []
        self.felt_by: list[int] = []
        self.after: list[list[int]] = []
        self.before: list[int] = []
        self.start_s: list[float] = []
        self.end_s: list[float] = []
        self._link: dict[str, int] = {}
        self._known: dict[Links, tuple[tuple[int, float], ...]] = {}

    def add(self, work_s: float, before: tuple[int, ...], links: Links = (), computes: int = -1, felt_by: int = -1) -> int:
        """A task of `work_s` that waits for the tasks `before` (-1 is none): computing of group `computes`, or a flow over `links` that
        the group `felt_by` feels."""
        number = len(self.work_s)
        self.work_s.append(work_s)
        if links not in self._known:
            self._known[links] = tuple((self._link.setdefault(name, len(self._link)), share) for name, share in links)
        self.links.append(self._known[links])
        self.computes.append(computes)
        self.felt_by.append(felt_by)
        self.after.append([])
        waits = 0
        for task in before:
            if task >= 0:
                self.after[task].append(number)
                waits += 1
        self.before.append(waits)
        return number

    def run(self) -> float:
        """Fill in all times; returns that of the last end."""
        work_s, links, computes, felt_by, after = self.work_s, self.links, self.computes, self.felt_by, self.after
        count = len(work_s)
        waits, done = list(self.before), [False] * count
        self.start_s = start_s = [0.0] * count
        self.end_s = end_s = [inf] * count
        load = [0.0] * len(self._link)
        on: list[set[int]] = [set() for _ in self._link]
        groups = 1 + max([*computes, *felt_by], default=-1)
        felt = [0] * groups  # flows that the group feels now
        busy = [-1] * groups  # what the group computes now
        slow = 1.0 - self.felt_share
        pace: dict[int, tuple[float, float, float]] = {}  # of running tasks that are not at full pace, or were: pace, since, work left then
        heap: list[tuple[float, int]] = []
        ready = [task for task in range(count) if not waits[task]]
        now = 0.0

        def speed(task: int) -> float:
            if computes[task] >= 0:
                return slow if felt[computes[task]] else 1.0
            most = max([load[link] for link, _ in links[task]], default=1.0)
            return 1.0 / most if most > 1.0 + 1e-12 else 1.0

        def repace(task: int) -> None:
            """Its speed may have changed at `now`: what is left takes so much longer or shorter."""
            old, since, left = pace.get(task) or (1.0, start_s[task], work_s[task])
            new = speed(task)
            if new != old:
                left = max(0.0, left - old * (now - since))
                pace[task] = new, now, left
                end_s[task] = now + left / new if new > 0.0 else inf
                if new > 0.0:
                    heappush(heap, (end_s[task], task))

        def change(task: int, sign: int) -> set[int]:
            """Put a flow on its links, or take it off; returns the tasks whose speed that may change."""
            touched: set[int] = set()
            for link, share in links[task]:
                if sign > 0:
                    on[link].add(task)
                else:
                    on[link].discard(task)
                most = max(load[link], load[link] + sign * share)
                load[link] = load[link] + sign * share if on[link] else 0.0
                if most > 1.0 + 1e-12:
                    touched |= on[link]
            group = felt_by[task]
            if group >= 0 and slow < 1.0:
                felt[group] += sign
                if busy[group] >= 0 and felt[group] == (sign > 0):
                    touched.add(busy[group])
            touched.discard(task)
            return touched

        while True:
            while ready:
                task = ready.pop()
                start_s[task] = now
                left = work_s[task]
                if left > 0.0:
                    touched: set[int] = set()
                    if computes[task] >= 0:
                        busy[computes[task]] = task
                    else:
                        touched = change(task, 1)
                    end_s[task] = now + left
                    heappush(heap, (now + left, task))
                    repace(task)
                    for other in touched:
                        repace(other)
                    continue
                end_s[task] = now
                for other in after[task]:
                    waits[other] -= 1
                    if not waits[other]:
                        ready.append(other)
            if not heap:
                break
            ended, task = heappop(heap)
            if done[task] or ended != end_s[task]:
                continue  # an end that was put off or brought forward
            now, done[task] = ended, True
            if computes[task] >= 0:
                busy[computes[task]] = -1
            else:
                for other in change(task, -1):
                    repace(other)
            pace.pop(task, None)
            for other in after[task]:
                waits[other] -= 1
                if not waits[other]:
                    ready.append(other)
        assert inf not in end_s, "a task never ended"
        return max(end_s, default=0.0)
