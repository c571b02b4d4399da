"""From the rings to the sinks: drains records, orders them, delivers rows."""
