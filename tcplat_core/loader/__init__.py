"""The privileged side of a run: a child process that compiles, loads, attaches, and ends.

The only place that imports bcc. It hands the file descriptors to the session
and goes; LLVM's 130 MB go with it.
"""
