"""The connecting side of a TCP connection."""
