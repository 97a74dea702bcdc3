"""A store of limits' numbers that is elsewhere, as several processes would share one: the seam's second side."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

import gateway as g

Place = tuple[str, str]


class FarStore:
    """One plain dict of what each call holds; every sum is made anew. Commands are carried out in order, later.

    As simple as it can be said: it shares no line with `MemoryStore`, and is what that is compared with.
    """

    def __init__(self, fold: g.Fold, clock: g.Clock) -> None:
        self.fold, self.clock = fold, clock
        self.held: dict[g.Hold, dict[str, Any]] = {}
        self.error: Exception | None = None  # what every answer is, where it cannot be asked
        self._commands: deque[tuple[asyncio.Future[Any], Callable[[], Any], bool]] = deque()

    # What a store must do

    def enter(self, hold: g.Hold) -> asyncio.Future[g.Standing | None]:
        return self._send(lambda: self._enter(hold))

    def reserve(self, hold: g.Hold, demand: g.Demand) -> asyncio.Future[g.Standing | None]:
        return self._send(lambda: self._reserve(hold, demand))

    def charge(self, hold: g.Hold, amounts: Mapping[str, int]) -> None:
        self._send(lambda: self._row(hold)["amounts"].update(amounts), is_asked=False)

    def settle(self, hold: g.Hold, slots_only: bool = False) -> None:
        self._send(lambda: self._settle(hold, slots_only), is_asked=False)

    def find_spent(self, hold: g.Hold) -> g.Standing | None:
        return self._find_full(hold, {"tokens": 0, "usd": 0})

    def _find_full(self, hold: g.Hold, need: Mapping[str, int]) -> g.Standing | None:
        for budget in hold.budgets:
            for limit in budget.limits:
                if limit.unit in need:
                    standing = self._standing(budget, limit, need[limit.unit])
                    if standing.used >= standing.allowed or self._taken(standing) + standing.need > standing.allowed:
                        return standing
        return None

    def standings(self, hold: g.Hold) -> list[g.Standing]:
        rows = []
        for budget in hold.budgets:
            rows += [self._standing(budget, limit) for limit in budget.limits]
            if budget.concurrent < 1e18:
                rows.append(g.slots_standing(budget, self.running()[budget.id]))
        return rows

    async def close(self) -> None:
        while self._commands:
            await asyncio.sleep(0.001)

    # How it does it

    def _send(self, command: Callable[[], Any], is_asked: bool = True) -> asyncio.Future[Any]:
        """Carry out a command later. What is only said is carried out even where nothing can be asked."""
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._commands.append((answer, command, is_asked))
        loop.call_later(0.001, self._carry_out)
        return answer

    def _carry_out(self) -> None:
        answer, command, is_asked = self._commands.popleft()
        if self.error and is_asked:
            answer.set_exception(self.error)
            return
        result = command()
        if not answer.cancelled():
            answer.set_result(result)

    def _row(self, hold: g.Hold) -> dict[str, Any]:
        return self.held.setdefault(hold, {"slots": [], "counts in": [], "step": None, "amounts": Counter()})

    def _enter(self, hold: g.Hold) -> g.Standing | None:
        standing = self._find_full(hold, {"tokens": 0, "usd": 0, "requests": 1})
        if standing:
            return standing
        row = self._row(hold)
        row["counts in"] = [budget.id for budget in hold.budgets]
        for budget in hold.budgets[len(row["slots"]) :]:
            if self.running()[budget.id] >= budget.concurrent:
                return g.slots_standing(budget, self.running()[budget.id])
            row["slots"].append(budget.id)
            hold.slots = len(row["slots"])
        row["step"] = self.clock.wall() // 5
        return None

    def _reserve(self, hold: g.Hold, demand: g.Demand) -> g.Standing | None:
        standing = self._find_full(hold, demand.need)
        if standing:
            return standing
        output = demand.output
        for budget in hold.budgets:
            for limit in budget.limits:
                if limit.unit in demand.need and demand.per_token[limit.unit]:
                    standing = self._standing(budget, limit)
                    left = standing.allowed - self._taken(standing) - demand.need[limit.unit]
                    output = min(output, left / demand.per_token[limit.unit])
        for unit, need in demand.need.items():
            self._row(hold)["amounts"][unit] += need + int(output * demand.per_token[unit])
        return None

    def _settle(self, hold: g.Hold, slots_only: bool) -> None:
        self._row(hold)["slots"] = []
        hold.slots = 0
        if not slots_only:
            del self.held[hold]

    def running(self) -> Counter[Place]:
        """How many calls run, by budget."""
        return Counter(place for row in self.held.values() for place in row["slots"])

    @staticmethod
    def _taken(standing: g.Standing) -> float:
        return standing.used + standing.held

    def _amounts(self, budget: g.Budget, limit: g.Limit, now: float) -> tuple[float, float]:
        """What of a limit is spent and held at a time."""
        rows = [row for row in self.held.values() if budget.id in row["counts in"]]
        held = sum(row["amounts"][limit.unit] for row in rows)
        if limit.unit == "requests":
            steps = [row["step"] for row in rows if row["step"] is not None]
            is_sliding = limit.window.kind == "sliding"
            held = sum(not is_sliding or abs(now // 5 - step) * 5 <= limit.window.seconds for step in steps)
        counters = self.fold.scope(budget.scope, budget.name)
        return counters.spent(limit.unit, limit.window, now), held

    def _standing(self, budget: g.Budget, limit: g.Limit, need: int = 0) -> g.Standing:
        now, allowed = self.clock.wall(), limit.amount * g.NANO[limit.unit]
        used, held = self._amounts(budget, limit, now)
        resets_at = self.fold.scope(budget.scope, budget.name).resets_at(limit.window, now, self.fold.calendar)
        seconds = limit.window.seconds
        wait_s = 0
        if limit.window.kind == "sliding" and need <= allowed:
            waits = (
                s for s in range(1, seconds) if sum(self._amounts(budget, limit, now + s)) + max(need, 1) <= allowed
            )
            wait_s = next(waits, seconds)
        return g.Standing(budget, limit, used, held, allowed, resets_at, need, wait_s)
