"""A run that was recorded: bytes, rows, filters, sinks. Needs neither root nor a kernel."""
