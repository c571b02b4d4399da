"""Reads and replays captures. Needs neither root nor a kernel."""
