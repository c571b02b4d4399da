"""``python -I -m tcplat_core.loader FD``: a request on standard input, the answer on FD."""

from __future__ import annotations

import os
import socket
import sys
import traceback

from tcplat_core.errors import TOO_MANY_FILES, TcplatError

from .attach import Loader, refuse_without_capabilities
from .bpf import lift_memory_limit, try_bpf
from .cache import Cache
from .protocol import Answer, Refusal, Request, send_answer


def main() -> None:
    """Answer one request and end, whatever happens, without Python's or bcc's clean-up."""
    to = socket.socket(fileno=int(sys.argv[1]))
    answer: Answer | Refusal
    try:
        refuse_without_capabilities()
        lift_memory_limit()
        try_bpf()
        data = sys.stdin.buffer.read()
        if not data:  # the session gave up
            os._exit(0)
        answer = Loader(Request.unpack(data), Cache.open()).run()
    except TcplatError as error:
        answer = Refusal(str(error), error.exit_code, _log(error))
    except Exception as error:  # noqa: BLE001 - a bug of ours; the session shows it
        known = TOO_MANY_FILES.get(error.errno or 0) if isinstance(error, OSError) else None
        answer = Refusal(f"the loader failed: {known or repr(error)}", 1, _log(error))
    try:
        send_answer(to, answer)
    except TcplatError as error:
        send_answer(to, Refusal(str(error), error.exit_code, _log(error)))
    sys.stdout.flush()
    sys.stderr.flush()
    # bcc's atexit handler would disable the perf events that the session now holds.
    os._exit(0)


def _log(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


main()
