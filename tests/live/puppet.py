"""A process that runs what it is sent: one JSON string of Python per line, one JSON answer each.

Started by harness.Puppet. It ends with its standard input, so that nothing
outlives the test run that started it.
"""

from __future__ import annotations

import ast
import json
import sys
from typing import Any


def _obey(code: str, scope: dict[str, Any]) -> Any:
    """Run the code; the value of its last line is the answer, if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<command>", "exec"), scope)  # noqa: S102 - this is what it is for
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "<command>", "eval"), scope)  # noqa: S307
    return None


def main() -> None:
    scope: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            answer = {"value": _obey(json.loads(line), scope)}
        except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to know
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer, default=repr) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
