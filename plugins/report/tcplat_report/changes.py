"""How the percentiles of each stage changed from one capture to another."""

from __future__ import annotations

import math
import random
import zlib
from typing import Any

import attrs
from tcplat_stages.chain import STAGES
from tcplat_stages.samples import TOTAL

from .sample import DRAWS, LEAST, Quantiles, Sample, group_order, too_few

CONNECT = "connect"
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
CONFIDENCE = 0.99
"""Of the interval: one in 200 lies above the truth by chance, one in 200 below."""

Key = tuple[tuple[Any, ...], str]
"""Group and stage."""


@attrs.frozen
class Change:
    """Of one percentile of one stage.

    Args:
        base: ns; None where there is too little.
        interval: Of `change`, as shares: 0.1 is +10 %.
        interval_ns: The same as a difference.
        too_little: Why it is not judged; empty where it is.
    """

    group: tuple[Any, ...]
    stage: str
    percentile: str
    counts: tuple[int, int]
    base: int | None = None
    new: int | None = None
    interval: tuple[float, float] | None = None
    interval_ns: tuple[int, int] | None = None
    too_little: str = ""

    @property
    def change(self) -> float | None:
        """As a share of the base; None where that is nothing."""
        return self.new / self.base - 1 if self.base and self.new is not None else None

    @property
    def certain(self) -> bool:
        """The interval has no zero in it."""
        return self.interval_ns is not None and (self.interval_ns[0] > 0 or self.interval_ns[1] < 0)


def changes(base: dict[Key, Sample], new: dict[Key, Sample], seed: int) -> list[Change]:
    """Of every group, stage and percentile, in order."""
    found = []
    for key in sorted(base.keys() | new.keys(), key=_order):
        group, stage = key
        before, after = (Quantiles(one.get(key, Sample())) for one in (base, new))
        counts = (before.count, after.count)
        for name, share in PERCENTILES.items():
            least = max(LEAST, round(1 / (1 - share)))
            words = too_few(counts, least)
            if words:
                old_ns, new_ns = (
                    one.value(share) if one.count else None for one in (before, after)
                )
                found.append(Change(group, stage, name, counts, old_ns, new_ns, too_little=words))
                continue
            # Each of its own, so that a stage's figures do not hang on what else there is.
            label = f"{seed} {group!r} {stage} {name}"
            chance = random.Random(zlib.crc32(label.encode()))  # noqa: S311 - statistics
            old, fresh = before.draw(share, chance), after.draw(share, chance)
            differences = sorted(b - a for a, b in zip(old, fresh, strict=True))
            ratios = sorted(
                b / a - 1 if a else (math.inf if b else 0.0)
                for a, b in zip(old, fresh, strict=True)
            )
            low = round(DRAWS * (1 - CONFIDENCE) / 2)
            found.append(
                Change(
                    group,
                    stage,
                    name,
                    counts,
                    before.value(share),
                    after.value(share),
                    (ratios[low], ratios[-1 - low]),
                    (differences[low], differences[-1 - low]),
                )
            )
    return found


def _order(key: Key) -> tuple[tuple[str, ...], int, int, str]:
    group, stage = key
    first = stage.split("+")[0]
    place = STAGES.index(first) if first in STAGES else len(STAGES) + (stage == TOTAL)
    if stage == CONNECT:
        place = -1
    return group_order(group), place, stage.count("+"), stage
