"""How often a run looks at what, and how long it waits."""

from __future__ import annotations

HOLD_S = 0.003
"""How long a row waits, unless told otherwise, for an older one that may still turn up."""
POLL_S = 0.003
"""Between two looks at the rings while events come. Handlers never wake us: that costs 5 µs."""
BUSY_POLL_S = 0.01
"""The same where a look brings MANY rows: to wake up costs as much as a hundred of them."""
MANY = 300
IDLE_POLL_S = 0.02
"""The same, at most, where nobody may sleep: a ring of 8 MiB takes 2.9 M events per second so long.

Elsewhere it is from here on that the session sleeps until a record wakes it.
"""
PATIENCE = 0.03
"""How fast that grows: by so much of the time since something came."""
LOOK_S = 1.0
"""Between two looks at whether interfaces are still there."""
GLANCE_S = 0.1
"""Between two looks at whether what is traced still lives."""
TICK_S = 0.25
"""How often sinks are told that time passes while nothing comes."""
LATE_S = 0.1
"""So late a row may come that was stamped before; by then, it is told that none is missing."""
LINGER_S = 0.1
"""How long the run outlives what it traces: closing handshakes go on without the process."""
