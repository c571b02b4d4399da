"""``python -I -m tcplat_core.loader PARENT FD``: a request on standard input, the answer on FD."""

from __future__ import annotations

import os
import socket
import sys
import traceback

from tcplat_core.errors import OUT_OF_MEMORY, TcplatError, of_system_call

from . import isolation

# First: what comes now takes 90 ms, in which the session may die.
isolation.begin(int(sys.argv[1]))

from tcplat_core.kernel.bpf import lift_memory_limit, try_bpf  # noqa: E402
from tcplat_core.kernel.rights import refuse_without_capabilities  # noqa: E402

from .attach import Loader  # noqa: E402
from .cache import Cache  # noqa: E402
from .protocol import Answer, Refusal, Request, send_answer  # noqa: E402


def main() -> None:
    """Answer one request and end, whatever happens, without Python's or bcc's clean-up."""
    to = socket.socket(fileno=int(sys.argv[2]))
    answer: Answer | Refusal
    work = None
    try:
        refuse_without_capabilities()
        lift_memory_limit()
        try_bpf()
        data = sys.stdin.buffer.read()
        if not data:  # the session gave up
            os._exit(0)
        cache = Cache.open()
        work = isolation.WorkFolder.enter(cache.root)
        answer = Loader(Request.unpack(data), cache).run()
    except TcplatError as error:
        answer = Refusal(str(error), error.exit_code, _log(error))
    except MemoryError as error:
        answer = Refusal(OUT_OF_MEMORY, 1, _log(error))
    except Exception as error:  # noqa: BLE001 - a bug of ours; the session shows it
        known = of_system_call(error) if isinstance(error, OSError) else TcplatError(repr(error))
        answer = Refusal(f"the loader failed: {known}", known.exit_code, _log(error))
    try:
        send_answer(to, answer)
    except TcplatError as error:
        send_answer(to, Refusal(str(error), error.exit_code, _log(error)))
    if work:
        work.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # bcc's atexit handler would disable the perf events that the session now holds.
    os._exit(0)


def _log(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


main()
