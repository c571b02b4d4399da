"""How the session waits while no records come."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator

import pytest

from tcplat_core.run.gate import Sleeper

LONG_S = 60.0


class Gate:
    """Memory instead of tcplat_gate, and a pipe instead of a ring."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("gate")
        os.ftruncate(self.fd, mmap.PAGESIZE)
        self._map = mmap.mmap(self.fd, mmap.PAGESIZE)
        self._map[:4] = (1).to_bytes(4, "little")
        self.ring, self._writer = os.pipe()
        self.other, self._other_writer = os.pipe()
        self.sleeper = Sleeper(self.fd, [self.ring])

    @property
    def open(self) -> bool:
        """What handlers see in slot 0."""
        return any(self._map[:4])

    @property
    def asleep(self) -> bool:
        """In slot 1: slots are 8 bytes apart."""
        return any(self._map[8:12])

    @asleep.setter
    def asleep(self, value: bool) -> None:
        self._map[8:12] = value.to_bytes(4, "little")

    def submit(self) -> None:
        """Do as the first handler does that finds the session asleep."""
        assert self.asleep
        self.asleep = False
        os.write(self._writer, b"!")

    def stir(self) -> None:
        """Make the other fd readable."""
        os.write(self._other_writer, b"!")

    def close(self) -> None:
        """Let go of everything."""
        self.sleeper.close()
        self._map.close()
        for fd in (self.fd, self.ring, self._writer, self.other, self._other_writer):
            os.close(fd)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """One, closed afterwards."""
    made = Gate()
    yield made
    made.close()


def asleep(gate: Gate, *also: int) -> threading.Thread:
    """Start a thread that sleeps at the gate."""
    thread = threading.Thread(target=gate.sleeper.sleep, args=(LONG_S, also))
    thread.start()
    while not gate.asleep:
        assert thread.is_alive()
        time.sleep(0.001)
    return thread


def test_first_record_wakes_the_sleeper(gate: Gate) -> None:
    thread = asleep(gate)
    gate.submit()
    thread.join(LONG_S / 2)
    assert not thread.is_alive()
    assert not gate.asleep


def test_other_fd_wakes_the_sleeper(gate: Gate) -> None:
    thread = asleep(gate, gate.other)
    gate.stir()
    thread.join(LONG_S / 2)
    assert not thread.is_alive()
    assert not gate.asleep


def test_pending_record_prevents_sleep(gate: Gate) -> None:
    gate.asleep = True
    gate.submit()
    began = time.monotonic()
    gate.sleeper.sleep(LONG_S)
    assert time.monotonic() - began < LONG_S / 2
    assert not gate.asleep


def test_sleep_ends_after_its_timeout(gate: Gate) -> None:
    began = time.monotonic()
    gate.sleeper.sleep(0.05)
    assert time.monotonic() - began >= 0.05
    gate.sleeper.sleep(-1)
    assert not gate.asleep


def test_gate_stays_open_until_shut(gate: Gate) -> None:
    gate.sleeper.sleep(0)
    assert gate.open
    gate.sleeper.shut()
    assert not gate.open
