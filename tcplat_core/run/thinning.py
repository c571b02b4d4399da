"""Keeps what a run costs below --max-overhead: makes rows of fewer connections, or of more again.

What is measured is what can be acted on: the time in which the programs run, and the CPU time of
the session, as a share of all CPU time of the host.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable, Sequence

import attrs

from tcplat_core.event.clock import kernel_ns
from tcplat_core.kernel.fdinfo import number
from tcplat_core.plugin.sampling import MOST, Sampled

_STEADY = 3
"""Intervals in a row in which more connections would have been affordable, before there are."""
_SPARE = 0.9
"""Part of the limit that may be planned for."""
_FORGET = 0.98
"""A step that was once too expensive is tried again: what it cost counts less each interval."""
_MOST_STEPS = 3
"""Halvings at a time: the first intervals of a run have only a few events."""
_FUTILE = 0.02
"""A halving that saves less than this part of the cost is useless."""
_USELESS = 3
"""So many useless halvings in a row are not followed by another one for AGAIN intervals: one may
only seem so, when what was left in the rings is read meanwhile, or a server got faster by it."""
_AGAIN = 60
_LEAD_NS = 20_000_000
"""A share is announced so long before it holds, so that every CPU knows it by then."""
_TICK_NS = 1 << 10
_SHIFT_BITS = 5


@attrs.define(eq=False)
class Budget:
    """Decides how often the share is halved. Pure arithmetic; call it once per interval.

    Args:
        limit: Largest share of the CPU time.
        most: Most halvings.
    """

    limit: float
    most: int
    halvings: int = attrs.field(default=0, init=False)
    futile: bool = attrs.field(default=False, init=False)
    """Another halving would save next to nothing, and the cost is above the limit."""
    _saved: dict[int, float] = attrs.field(factory=dict, init=False)
    """Halving -> the cost that it saved, when it was made last."""
    _before: tuple[int, float] | None = attrs.field(default=None, init=False)
    """Halvings and cost before the last change, until an interval shows what it saved."""
    _mixed: bool = attrs.field(default=True, init=False)
    """The interval that ends next says nothing: the run began in it, or the share changed."""
    _steady: int = attrs.field(default=0, init=False)
    _useless: int = attrs.field(default=0, init=False)
    """Useless halvings in a row."""
    _waited: int = attrs.field(default=0, init=False)
    """Intervals since halving was given up."""

    def decide(self, cost: float) -> bool:
        """Take the cost of an interval; return whether `halvings` has changed."""
        if self._mixed:
            self._mixed = False
            return False
        self._learn(cost)
        if cost > self.limit:
            self._steady = 0
            return self._thin(cost)
        self.futile, self._useless, self._waited = False, 0, 0
        wanted = self.halvings > 0 and cost + self._price(cost) < _SPARE * self.limit
        self._steady = self._steady + 1 if wanted else 0
        if self._steady < _STEADY:
            return False
        self._change(self.halvings - 1, cost)
        return True

    def _price(self, cost: float) -> float:
        """Return what one halving less would cost: what it saved, and at most as much again."""
        return min(self._saved.get(self.halvings, cost), cost)

    def _thin(self, cost: float) -> bool:
        if self.halvings == self.most:
            self.futile = True
            return False
        if self.futile:
            self._waited += 1
            if self._waited < _AGAIN:
                return False
        self._waited = 0
        steps = min(_MOST_STEPS, math.ceil(math.log2(cost / self.limit)), self.most - self.halvings)
        self._change(self.halvings + max(1, steps), cost)
        return True

    def _change(self, halvings: int, cost: float) -> None:
        self._before = self.halvings, cost
        self.halvings = halvings
        self._mixed, self._steady = True, 0

    def _learn(self, cost: float) -> None:
        """Note what the last change saved; each halving saves half as much as the one before."""
        self._saved = {step: saved * _FORGET for step, saved in self._saved.items()}
        if self._before is None:
            return
        halvings, before = self._before
        self._before = None
        steps = self.halvings - halvings
        saved = (before - cost) if steps > 0 else (cost - before)
        saved = max(saved, 0.0)
        first, last = sorted((halvings, self.halvings))
        parts = [2.0 ** -(step - first) for step in range(first + 1, last + 1)]
        for step, part in zip(range(first + 1, last + 1), parts, strict=True):
            self._saved[step] = saved * part / sum(parts)
        useless = steps > 0 and cost > self.limit and saved < _FUTILE * before
        self._useless = self._useless + 1 if useless else 0
        self.futile = self._useless >= _USELESS


@attrs.define(eq=False)
class Costs:
    """Reads what a run has cost.

    Args:
        programs: fds of its programs.
    """

    programs: Sequence[int]
    _seen: tuple[float, float] = attrs.field(init=False)
    """CPU time and wall time of the last reading, s."""

    def __attrs_post_init__(self) -> None:
        self._seen = self._cpu_s(), time.monotonic()

    @classmethod
    def of(cls, fds: Sequence[int]) -> Costs:
        """Return the costs of those of these fds that are programs; several may be of one."""
        programs = {number(fd, "prog_id"): fd for fd in fds}
        programs.pop(None, None)
        return cls(list(programs.values()))

    def share(self) -> float:
        """Return the cost since the last call, as a share of the time of all CPUs."""
        cpu_s, now = self._cpu_s(), time.monotonic()
        (cpu_before_s, before), self._seen = self._seen, (cpu_s, now)
        available_s = max(now - before, 1e-9) * os.sysconf("SC_NPROCESSORS_ONLN")
        return (cpu_s - cpu_before_s) / available_s

    def _cpu_s(self) -> float:
        times = (number(fd, "run_time_ns") or 0 for fd in self.programs)
        return sum(times) / 1e9 + time.process_time()


@attrs.define(eq=False)
class Thinner:
    """Changes the share of the connections that have rows.

    Args:
        share_fd: fd of tcplat_thinning, an array of u64 with BPF_F_MMAPABLE.
        one_in: The share to begin with, and the largest.
        limit: As in Budget.
        cost: Returns the cost since its last call.
        say: Prints a message to the user.
    """

    share_fd: int
    one_in: int
    limit: float
    cost: Callable[[], float]
    say: Callable[[str], None]
    _budget: Budget = attrs.field(init=False)
    _map: mmap.mmap = attrs.field(init=False)
    _share: memoryview = attrs.field(init=False)
    """One word, written by one store. struct.pack_into() clears it first, and a program that reads
    it then makes rows of all connections."""
    _said: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._budget = Budget(self.limit, (MOST // self.one_in).bit_length() - 1)
        self._map = mmap.mmap(self.share_fd, mmap.PAGESIZE)
        self._share = memoryview(self._map)[:8].cast("Q")

    def check(self) -> Sampled | None:
        """Measure, once a second; return the new share if it changes."""
        before, cost = self._budget.halvings, self.cost()
        changed = self._budget.decide(cost)
        if self._budget.futile and not self._said:
            self._said = True
            self.say(
                f"this run costs {cost:.1%} of the CPU time, more than --max-overhead "
                f"{self.limit:.1%}, although 1/{self.one_in << before} of the connections have "
                "rows: fewer probes would cost less"
            )
        if not changed:
            return None
        at_ns = (kernel_ns() + _LEAD_NS) // _TICK_NS * _TICK_NS
        self._share[0] = at_ns | before << _SHIFT_BITS | self._budget.halvings
        return Sampled(self.one_in << self._budget.halvings, at_ns)

    def close(self) -> None:
        """Unmap. The caller closes the fd."""
        self._share.release()
        self._map.close()
