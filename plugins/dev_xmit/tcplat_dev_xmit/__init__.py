"""Packets on their way out: the last moment before a device has them."""
