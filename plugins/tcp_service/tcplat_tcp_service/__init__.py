"""The accepting side of a TCP connection."""
