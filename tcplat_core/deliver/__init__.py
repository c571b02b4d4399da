"""From the ring to the sinks: records drained, put in order, handed over."""
