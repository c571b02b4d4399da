"""Gives up root: no third-party Python runs with it, and output files belong to the user."""

from __future__ import annotations

import ctypes
import os
import pwd
import struct

_PR_SET_NO_NEW_PRIVS = 38
_PR_CAPBSET_DROP = 24
_CAP_VERSION_3 = 0x20080522


def drop() -> None:
    """Become the user behind sudo; without one, keep the uid and drop every capability.

    An identity that cannot read the Python installation (a pyenv below /root)
    would fail at the next import: then the uid is kept as well. Does nothing for
    a process that is not root. Irrevocable.
    """
    if os.geteuid() != 0:
        return
    uid = int(os.environ.get("SUDO_UID") or 0)
    gid = int(os.environ.get("SUDO_GID") or 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if uid and _can_read_python(uid, gid):
        try:
            groups = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
        except KeyError:  # a uid without an account
            groups = [gid]
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    else:
        for capability in range(64):
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        header = struct.pack("=Ii", _CAP_VERSION_3, 0)
        if libc.capset(header, bytes(24)):
            raise OSError(ctypes.get_errno(), "capset")
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _can_read_python(uid: int, gid: int) -> bool:
    os.setegid(gid)
    os.seteuid(uid)
    try:
        return all(os.access(path, os.R_OK, effective_ids=True) for path in (os.__file__, __file__))
    finally:
        os.seteuid(0)
        os.setegid(0)
