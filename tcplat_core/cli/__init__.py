"""The command line: one module a command, imported when it is called or listed.

What a command needs is imported within it: `plugins list` and --help have to answer at once, and
must not need what only `run` does.
"""

OWN = {
    "doctor": "tcplat_core.cli.doctor:doctor",
    "plugins": "tcplat_core.cli.plugins:plugins",
    "replay": "tcplat_core.cli.replay:replay",
    "run": "tcplat_core.cli.run:run",
}
"""Entry points of tcplat's own commands."""
