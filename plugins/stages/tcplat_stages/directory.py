"""The connections that are kept, and how a row finds its own (D73)."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from .connection import Connection, End
from .losses import Losses
from .stream import CLIENT
from .turns import Turns

Addresses = tuple[Any, ...]
"""Network namespace, and address and port of both ends."""
Way = tuple[Connection, int]
"""The connection of a packet, and the end that sent it."""

_STRAGGLERS_NS = 2_000_000_000
"""So long a connection that is over still takes what belongs to it."""
_MOST_OVER = 8_192
"""Connections that are over and still take what belongs to them."""
_MOST_ALIKE = 64
"""Most connections that are kept per pair of addresses: each row searches them."""
_MOST_DONE = 65_536
"""Most sockets that are kept longer than their connections."""
_LAST_NS = attrgetter("last_ns")


class Directory:
    """The connections that are kept, by number, socket, addresses, and place of their packets.

    Args:
        turns: Gets the connections that end.
        losses: When rows were lost.
        most: Most connections that are kept; beyond that, the one that was silent for longest is
            given up. Of those without a socket and data, a quarter as many; the oldest is.

    Attributes:
        conns: By number.
        by_sock: By the number of a socket: the end that has it.
        done: Open sockets of connections that are reported: their later rows are ignored.
        by_addresses: By addresses, the youngest last; of loopback by network namespace, too.
        by_packet: By the namespace and addresses of a packet: the connection and direction.
        given_up: Number of connections that were given up because there were too many.
        closed_windows: Streams whose sender has closed its own window.
    """

    def __init__(self, turns: Turns, losses: Losses, most: int) -> None:
        self.conns: dict[int, Connection] = {}
        self.by_sock: dict[int, End] = {}
        self.done: dict[int, None] = {}
        self.by_addresses: dict[Addresses, list[Connection]] = {}
        self.by_packet: dict[Addresses, Way] = {}
        self.given_up = 0
        self.closed_windows = 0
        self._turns = turns
        self._losses = losses
        self._most = most
        self._most_bare = max(1, most // 4)
        self._bare: dict[int, Connection] = {}
        """Those that a packet without data began: the oldest first."""
        self._over: deque[Connection] = deque()
        """Connections that are over and still take what belongs to them."""
        self._number = 0

    def new(self, row: Any, *, turned: bool = False) -> Connection:
        """Return a new connection of a row; `turned` if the row is of the service's end."""
        if len(self.conns) >= self._most:
            self._make_room()
        self._number += 1
        conn = self.conns[self._number] = Connection(self._number, row, turned=turned)
        conn.breaks = self._losses.count
        return conn

    def _make_room(self) -> None:
        """Give up a sixteenth of the connections: those that were silent for longest."""
        count = max(1, self._most // 16)
        for conn in heapq.nsmallest(count, self.conns.values(), key=_LAST_NS):
            self.given_up += 1
            self.finish(conn, "given up")

    def keep_bare(self, conn: Connection) -> None:
        """Limit the connections that have neither a socket nor data.

        A port scan has nothing else, and so many that they would displace all connections.
        """
        bare = self._bare
        bare[conn.number] = conn
        while len(bare) > self._most_bare:
            oldest = bare.pop(next(iter(bare)))
            if not oldest.bare:
                continue
            # Its packets have ended it: time would have ended it a moment later.
            over = bool(oldest.closing_ns)
            self.given_up += not over
            self.finish(oldest, "closed" if over else "given up")

    def retire(self, end: End, ts_ns: int) -> None:
        """Note that an end's socket is done; finish the connection if the other one is."""
        end.closed_ns = ts_ns
        if self.by_sock.get(end.sock) is end:
            del self.by_sock[end.sock]
        other = end.conn.ends[1 - end.index]
        if not other.sock or other.closed_ns:
            self.finish(end.conn, "closed")

    def finish(self, conn: Connection, why: str) -> None:
        """End a connection, or the following of it."""
        self._turns.end(conn, why)
        self.remove(conn)
        for one in conn.ends:
            self._let_go(one)
            one.leave()
        self._over.append(conn)
        if len(self._over) > _MOST_OVER:
            self.release(self._over.popleft())
        # Its addresses stay for a while; what its streams held goes now.
        for flow in conn.flows:
            self.closed_windows -= flow.zero
            flow.zero = False
            flow.drop_logs()

    def remove(self, conn: Connection) -> None:
        """Remove a connection that is over, or became part of another."""
        del self.conns[conn.number]
        self._bare.pop(conn.number, None)

    def release_over(self, now_ns: int) -> int | None:
        """Free the addresses of what has been over for long.

        Returns:
            When the next ones will be free; None for never.
        """
        over = self._over
        while over and over[0].last_ns + _STRAGGLERS_NS < now_ns:
            self.release(over.popleft())
        return over[0].last_ns + _STRAGGLERS_NS + 1 if over else None

    def find(self, netns: Any, client: Any, service: Any) -> Sequence[Connection]:
        """Return the connections by these addresses, the youngest last."""
        found = self.by_addresses.get(_key(netns, client, service), ())
        _leave_fast_paths(found)
        return found

    def register(self, conn: Connection, netns: Any) -> None:
        """Add a connection to those that have its addresses."""
        key = _key(netns, conn.client, conn.service)
        self.by_addresses.setdefault(key, []).append(conn)
        conn.keys.append(key)

    def displace(self, conn: Connection, netns: Any, index: int | None = None) -> None:
        """Replace other connections by the same addresses in the same namespace.

        Args:
            conn: The connection.
            netns: The namespace.
            index: The end whose socket is there; None where a packet is.
        """
        known = self.by_addresses.get(_key(netns, conn.client, conn.service), ())
        _leave_fast_paths(known)
        if len(known) < 2:  # noqa: PLR2004 - itself
            return
        for one in list(known):
            if one is conn or one.replaced:
                continue
            conn.successor = conn.successor or one.over
            if one.is_in(netns, index):
                conn.successor = True
                self.replace(one)
            elif not one.over:
                self._doubt(one)
                if conn.flows[CLIENT].syn < 0:
                    conn.doubtful = True
        self._keep_few(known, conn)

    def _keep_few(self, known: Sequence[Connection], conn: Connection) -> None:
        """Of too many connections with the addresses of `conn`, give up the oldest.

        Those go first that others have replaced: only their sockets may still have a row.
        """
        while len(known) > _MOST_ALIKE:
            others = [one for one in known if one is not conn]
            oldest = next((one for one in others if one.replaced), others[0])
            if not oldest.over:
                self.given_up += 1
                self.finish(oldest, "given up")
            self.release(oldest)

    def _doubt(self, conn: Connection) -> None:
        """Note that another connection has the same addresses at the same time, elsewhere."""
        if conn.flows[CLIENT].syn < 0 or conn.unsure:
            conn.doubtful = True
        if conn.unsure:
            # What was joined may be of two. Each row finds its own connection from now on.
            self.finish(conn, "given up")
            self.release(conn)

    def replace(self, conn: Connection) -> None:
        """Replace a connection; its sockets may still be open, and read what came."""
        conn.replaced = True
        if not conn.over and any(end.sock and not end.closed_ns for end in conn.ends):
            self._leave_ways(conn)
            return
        if not conn.over:
            self.finish(conn, "port reused")
        self.release(conn)

    def release(self, conn: Connection) -> None:
        """Remove a connection from those that have its addresses."""
        for key in conn.keys:
            known = self.by_addresses.get(key, [])
            if conn in known:
                known.remove(conn)
                if not known:
                    del self.by_addresses[key]
        conn.keys = []
        self._leave_ways(conn)

    def _leave_ways(self, conn: Connection) -> None:
        """Remove the packet keys of a connection."""
        for key in conn.packet_keys:
            way = self.by_packet.get(key)
            if way is not None and way[0] is conn:
                del self.by_packet[key]
        conn.packet_keys = []

    def turn(self, conn: Connection) -> None:
        """Swap client and service, which were guessed wrong."""
        namespaces = {key[0] for key in conn.keys}
        self.release(conn)
        conn.client, conn.service = conn.service, conn.client
        conn.flows = (conn.flows[1], conn.flows[0])
        conn.fins = [1 - index for index in conn.fins]
        conn.fin_ns.reverse()
        if conn.reset_by is not None:
            conn.reset_by = 1 - conn.reset_by
        conn.guessed = False
        conn.answered, conn.replying = -1, None
        conn.ask_ns = conn.ask_by = None
        conn.came, conn.doubt = -1, None
        conn.waiting.clear()
        for netns in namespaces:
            self.register(conn, netns)

    def _let_go(self, end: End) -> None:
        """Drop the socket of a reported connection; if it is open, its late rows begin no other."""
        sock = end.sock
        if not sock or self.by_sock.get(sock) is not end:
            return
        del self.by_sock[sock]
        if end.conn.replaced:
            self.done[sock] = None
            if len(self.done) > _MOST_DONE:
                del self.done[next(iter(self.done))]


def likeliest(
    likely: list[Connection], known: Iterable[Connection], index: int | None, netns: Any
) -> Connection | None:
    """Return the one of these that a row of a namespace is of; None if no row shows it.

    Args:
        likely: Those that it may be of.
        known: All by these addresses.
        index: The end whose socket the row is of; None for a packet.
        netns: The namespace.
    """
    if not likely:
        return None
    here = [conn for conn in likely if conn.is_in(netns, index)]
    if len(here) == 1:
        return here[0]
    # By the same addresses there may be another connection, in two other namespaces.
    if len(likely) > 1 or sum(conn.is_open for conn in known) > 1:
        return None
    likely[0].unsure = True
    return likely[0]


def _leave_fast_paths(conns: Iterable[Connection]) -> None:
    """Take connections off the fast path: others have the same addresses, or are looked for."""
    for conn in conns:
        conn.leave_fast_path()


def _key(netns: Any, client: Any, service: Any) -> Addresses:
    return (netns if _is_loopback(client[0], service[0]) else None, *client, *service)


def _is_loopback(address: str, other: str) -> bool:
    """Return whether both ends are in one namespace: each one has these addresses."""
    return address == other or address.startswith("127.") or address == "::1"
