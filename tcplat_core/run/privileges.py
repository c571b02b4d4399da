"""Drops root and capabilities.

No third-party Python runs with them, and output files belong to the user.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import struct
from collections.abc import Mapping

from tcplat_core.errors import CannotRunError, refused
from tcplat_core.kernel.rights import CAP_VERSION_3, CAPABILITIES, capabilities, held
from tcplat_core.plugin.numbers import decimal

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 24, 38, 39
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_NO_UID = (1 << 32) - 1
"""(uid_t)-1: means "no change" to setresuid(2)."""

SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH while this process has rights: only root can write there."""
_HARMLESS = ("SUDO_UID", "SUDO_GID", "SUDO_USER", "COLUMNS", "TCPLAT_PURE")
"""Variables that are read before rights are dropped, and name no file."""

_ABOUT_OUTPUT = ("TERM", "LINES", "NO_COLOR", "LANG", "LC_ALL", "LC_CTYPE", "LC_MESSAGES")
"""Variables that name no code (LOCPATH does: the C library loads locales from it)."""

_libc = ctypes.CDLL(None, use_errno=True)
_given: dict[str, str] | None = None
"""The environment that tcplat was started with, while it is hidden."""
_dropped = False


def hide_environment() -> None:
    """Remove variables that another user may have set, as long as this process has rights.

    Libraries find files and programs through them (click `bash`, ctypes `gcc`).
    drop() restores them.
    """
    global _given  # noqa: PLW0603 - like os.environ, there is one per process
    if _given is not None:
        return
    _given = dict(os.environ)
    os.environ.clear()
    os.environ.update({name: _given[name] for name in _HARMLESS if name in _given})
    os.environ["PATH"] = SYSTEM_PATH


def environment() -> Mapping[str, str]:
    """Return the environment that tcplat was started with, for the command after ``--``."""
    return os.environ if _given is None else _given


def drop() -> None:
    """Become the user behind sudo; without one, keep the uid and drop every capability.

    The uid is also kept if that user cannot read the Python installation (a pyenv below /root):
    the next import would fail. If the uid is kept, and another user may have set the environment,
    only variables that name no code are restored. Does nothing for a process that has no more
    rights than its user. Irrevocable and idempotent.

    Raises:
        CannotRunError: A right could not be dropped.
    """
    global _dropped  # noqa: PLW0603 - see _given
    if _dropped:
        return
    if held():
        if os.geteuid() == 0 and (user := _user_behind_sudo()):
            uid, gid, groups = user
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        _give_up_capabilities()
        _check()
    _dropped = True
    if os.geteuid() or not _another_users_environment():
        _restore_environment()
    elif _given is not None:
        os.environ.update({name: _given[name] for name in _ABOUT_OUTPUT if name in _given})


def _restore_environment() -> None:
    global _given  # noqa: PLW0603 - see above
    if _given is not None:
        os.environ.clear()
        os.environ.update(_given)
        _given = None


def _another_users_environment() -> bool:
    """Return whether another user may have set the environment of this root process.

    `sudo -E` and `su -m` keep it. Libraries would load code that it names (OPENSSL_CONF) with
    uid 0, which can write root's files without any capability.
    """
    if _number("SUDO_UID"):
        return True
    try:
        return os.stat(environment().get("HOME", "/")).st_uid != 0
    except OSError:
        return True


def _give_up_capabilities() -> None:
    # Without CAP_SETPCAP the bounding set stays; no_new_privs keeps execve(2) from using it.
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    # Also after setresuid(2), which keeps inheritable ones, and with securebits all.
    header = struct.pack("=Ii", CAP_VERSION_3, 0)
    if _libc.capset(header, bytes(CAPABILITIES.size)):
        raise refused("capset", ctypes.get_errno())
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _check() -> None:
    """Read what is left: the calls above may fail without an error."""
    if any(capabilities()) or _libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1:
        raise CannotRunError("this kernel does not let tcplat give up its capabilities")


def _user_behind_sudo() -> tuple[int, int, list[int]] | None:
    """Return uid, gid and groups of SUDO_UID; None if there is no such user to become.

    Another user may have set the variables. So uid 0 and groups of which the user is no member
    are not accepted.

    Raises:
        CannotRunError: SUDO_UID or SUDO_GID is not a valid number.
    """
    uid, given = _number("SUDO_UID"), _number("SUDO_GID")
    if not uid:
        return None
    try:
        user = pwd.getpwuid(uid)
    except KeyError:  # a uid without an account
        gid = given or uid
        groups = [gid]
    else:
        # The gid of the account, unless sudo was called in a shell of newgrp(1).
        gid, groups = user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)
        if given and given in groups:
            gid = given
    return (uid, gid, groups) if _can_read_python(uid, gid) else None


def _number(variable: str) -> int:
    text = os.environ.get(variable) or "0"
    number = decimal(text, _NO_UID - 1)
    if number is None:
        raise CannotRunError(f"{variable}={text} is not a number as sudo sets it: unset {variable}")
    return number


def _can_read_python(uid: int, gid: int) -> bool:
    try:
        os.setegid(gid)
        os.seteuid(uid)
    except PermissionError:  # root without CAP_SETUID, in a container
        return False
    else:
        return all(os.access(path, os.R_OK, effective_ids=True) for path in (os.__file__, __file__))
    finally:
        os.seteuid(0)
        os.setegid(0)
