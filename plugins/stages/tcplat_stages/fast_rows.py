"""Which rows the fast path takes, and of which connection each is (D139)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .directory import Directory
from .fast_path import NIC_RX, NIC_TX, READY, RECV, RX_IP, SEND, FastPath
from .losses import PACKETS, Losses
from .packet_rows import PLAIN
from .row_fields import BEYOND_NS, Look
from .socket_rows import POINTS

if TYPE_CHECKING:
    from tcplat_core import SlimRows

_OTHER, _IGNORED = 0, 1
"""Codes of points that the fast path does not take, and of those of which nothing follows."""
_CODES = {
    "send": SEND,
    "recv": RECV,
    "ready": READY,
    "nic_tx": NIC_TX,
    "nic_rx": NIC_RX,
    "rx_ip": RX_IP,
}
_FIRST_PACKET, _AT_IP = NIC_TX, RX_IP
_MOST_BYTES = (1 << 32) - 1


class Way:
    """By which packets come: whose fast path, the end that sends them, the namespace."""

    def __init__(self, fast_path: FastPath, index: int, netns: Any) -> None:
        self.fast_path = fast_path
        self.index = index
        self.netns = netns


class FastPaths:
    """The batch whose rows are taken, and what its texts stand for."""

    def __init__(self) -> None:
        self._users: Any = []
        self._flags: Any = []
        self._ways: list[Way | None] = []
        """By the number of a packet's addresses: the way, as found last."""
        self._ends: Any = []
        self._hooks: Any = []
        self._codes: list[int] = []

    def begin(self, batch: SlimRows) -> None:
        """Take rows of this batch from now on."""
        self._users, self._flags = batch.users, batch.flags
        if batch.ends is not self._ends:
            self._ends, self._ways = batch.ends, []
        self._ways.extend([None] * (len(batch.ends) - len(self._ways)))
        if batch.hooks is not self._hooks:
            self._hooks, self._codes = batch.hooks, []
        for hook in batch.hooks[len(self._codes) :]:
            point = hook[1] if hook else ""  # null: rows of this hook come as objects
            known = not hook or point in POINTS or point in PACKETS
            self._codes.append(_CODES.get(point, _OTHER if known else _IGNORED))

    def may_take(self, look: Look) -> bool:
        """Return whether a row is of a point that may be plain, or one of which nothing follows."""
        return self._codes[look.hook] != _OTHER and look.ts_ns < BEYOND_NS

    def take(self, look: Look, directory: Directory, losses: Losses) -> bool:
        """Take a row if it is plain, and its connection on the fast path; else return False."""
        code = self._codes[look.hook]
        if code == _IGNORED:
            return True
        if not 0 <= look.seq <= _MOST_BYTES or look.bytes > _MOST_BYTES:
            return False
        if code < _FIRST_PACKET:
            fast_path = self._take_of_socket(code, look, directory, losses)
        else:
            text = self._flags[look.flags]
            if text not in PLAIN:
                return False
            bare = look.bytes <= 0 and text == "ACK" and not directory.closed_windows
            if bare and (code == _AT_IP or look.shows_window()):
                return True
            fast_path = self._take_packet(code, look, directory, losses)
        if fast_path is None:
            return False
        fast_path.conn.last_ns = losses.row_ns = look.ts_ns
        return True

    def _take_of_socket(
        self, code: int, look: Look, directory: Directory, losses: Losses
    ) -> FastPath | None:
        """Return the fast path that has taken a row of a socket."""
        end = directory.by_sock.get(look.sock)
        if end is None or end.conn.fast_path is None:
            return None
        fast_path: FastPath = end.conn.fast_path
        taken = fast_path.conn.breaks == losses.count and fast_path.take_of_socket(
            code, end.index, look.ts_ns, look.seq, look.bytes, self._users[look.user]
        )
        return fast_path if taken else None

    def _take_packet(
        self, code: int, look: Look, directory: Directory, losses: Losses
    ) -> FastPath | None:
        """Return the fast path that has taken a packet."""
        way = self._way(look.ends, directory.by_packet)
        if way is None:
            return None
        fast_path = way.fast_path
        taken = fast_path.conn.breaks == losses.count and fast_path.take_packet(
            code, way.index, look.ts_ns, look.seq, look.bytes, look.ack, look.window, way.netns
        )
        return fast_path if taken else None

    def _way(self, place: int, by_packet: dict[Any, Any]) -> Way | None:
        """Return the way of a packet's addresses; None if its connection is not on it."""
        way = self._ways[place]
        if way is not None and way.fast_path.active:
            return way
        netns, _, *addresses = self._ends[place]
        found = by_packet.get((netns, *addresses))
        if found is None or found[0].fast_path is None:
            return None
        way = self._ways[place] = Way(found[0].fast_path, found[1], netns)
        return way
