"""``--fail-on``: a limit of a change, and whether it was exceeded."""

from __future__ import annotations

import re

import attrs
from tcplat_stages.chain import STAGES, UNEXPLAINED
from tcplat_stages.formatting import nanos
from tcplat_stages.samples import TOTAL

from tcplat_core import UsageError

from .changes import CONNECT, PERCENTILES, Change
from .shares import SHARE, SHARES, Share

Compared = Change | Share


@attrs.frozen
class Condition:
    """``queue.p99:+10%``: a change beyond `limit` fails, if the whole interval lies there.

    ``unanswered:+0``: so many more fail, if they are a larger share of the requests, too.
    ``unanswered:+1%``: a share greater by so much fails, as with percentiles.
    """

    text: str
    stage: str
    percentile: str
    share: float | None
    ns: int | None
    rises: bool
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Condition:
        """From the command line.

        Raises:
            UsageError: It is not of that form.
        """
        if apart := re.fullmatch(
            rf"({'|'.join(SHARES)}):\+(?:(\d+)|(\d+(?:\.\d+)?)%)", text, re.ASCII
        ):
            stage, count, points = apart.groups()
            most = float(points) / 100 if points else None
            return cls(
                text, stage, SHARE, most, None, rises=True, count=int(count) if count else None
            )
        limit = r"(?:(\d+(?:\.\d+)?)%|(\d+(?:\.\d+)?(?:ns|us|ms|s)))"
        found = re.fullmatch(rf"([a-z_+]+)\.(p\d+):([+-]){limit}", text, re.ASCII)
        if not found:
            raise UsageError(
                f"--fail-on {text!r} is not of the form STAGE.PCT:LIMIT; "
                "write queue.p99:+10%, total.p50:+2ms, unanswered:+0 or unanswered:+1%"
            )
        stage, percentile, sign, share, absolute = found.groups()
        names = (*STAGES, TOTAL, CONNECT, UNEXPLAINED)
        for name in stage.split("+"):
            if name not in names:
                raise UsageError(
                    f"--fail-on {text!r}: there is no stage {name!r}; "
                    f"it must be one of {', '.join(names)}"
                )
        if percentile not in PERCENTILES:
            raise UsageError(f"--fail-on {text!r}: it must be one of {', '.join(PERCENTILES)}")
        factor = 1 if sign == "+" else -1
        return cls(
            text,
            stage,
            percentile,
            factor * float(share) / 100 if share else None,
            factor * nanos(absolute) if absolute else None,
            sign == "+",
        )

    def met_by(self, change: Compared) -> bool:
        """Return whether the whole interval, or a number, is beyond the limit."""
        if isinstance(change, Share):
            return self._met_by_share(change)
        interval = change.interval_ns if self.share is None else change.interval
        limit = self.ns if self.share is None else self.share
        if interval is None or limit is None:
            return False
        return interval[0] > limit if self.rises else interval[1] < limit

    def _met_by_share(self, change: Share) -> bool:
        if self.count is not None:
            more = change.counts[1] - change.counts[0]
            base, new = (share or 0.0 for share in change.shares)
            return more > self.count and new > base
        return (
            change.interval is not None
            and self.share is not None
            and change.interval[0] > self.share
        )
