"""One run from start to end, without root: what is asked of the loader, and what ends it."""
