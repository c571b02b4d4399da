"""Facts of this kernel, and system calls, with any rights. Knows nothing of a run."""
