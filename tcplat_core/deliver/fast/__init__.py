"""The C implementation of reordering and JSON lines; without a compiler Python does it."""
