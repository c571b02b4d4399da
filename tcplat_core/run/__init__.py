"""One run from start to end, without root: the loader's request and answer, and the end."""
