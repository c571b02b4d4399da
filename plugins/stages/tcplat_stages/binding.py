"""Which connection a socket is an end of: by its packets, its other end, or none yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .chain import CONNECT_CALLED, HANDSHAKE_DONE
from .connection import Connection, End
from .directory import Directory, likeliest
from .row_fields import NO_PROCESS, Process, calls, listens, shared, syn_of
from .stream import CLIENT, NOT_SEEN, SERVICE

_ROLES = {"tcp_client": CLIENT, "tcp_service": SERVICE, "client": CLIENT, "service": SERVICE}
"""Whose socket it is, by the probe, or by what tcp_stats says."""
_STREAM_PROBES = frozenset({"tcp_client", "tcp_service"})


class Binder:
    """Finds the connection of a socket by its rows, and joins what turns out to be one."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def bind(self, row: Any) -> End | None:
        """Return the end of a new socket, or of one that begins another connection."""
        if row.sock in self._directory.done and not calls(row):
            if row.point == "close":
                del self._directory.done[row.sock]
            return None
        index = _ROLES.get(row.probe)
        if index is None:
            role = getattr(row, "role", None)  # what an unknown probe calls so may be anything
            index = _ROLES.get(role) if isinstance(role, str) else None
        if index is None or row.dport is None or listens(row):
            return None
        if row.sport is None:
            conn = self._directory.new(row, turned=index == SERVICE)
        else:
            conn = self._connection_of(row, index)
        end = conn.ends[index]
        end.named = row.sport is not None
        _attach(end, row)
        self._directory.by_sock[row.sock] = end
        return end

    def begin_anew(self, end: End, row: Any) -> End | None:
        """End what a socket was that calls connect() or listen() again, and bind it anew."""
        self._directory.retire(end, end.conn.last_ns)
        return self.bind(row)

    def _connection_of(self, row: Any, index: int) -> Connection:
        """Return the connection of a socket: known by its packets or its other end, or new."""
        near, far = (row.saddr, row.sport), (row.daddr, row.dport)
        client, service = (near, far) if index == CLIENT else (far, near)
        syn = syn_of(row)
        conn = None
        # Nothing of a connection is older than the call that begins it.
        if not calls(row):
            conn = _free(self._directory.find(row.netns, client, service), index, row.netns, syn)
            if conn is None:
                turned = [
                    one for one in self._directory.find(row.netns, service, client) if one.guessed
                ]
                conn = _free(turned, 1 - index, row.netns, -1)
                if conn is not None:
                    self._directory.turn(conn)
        if conn is None:
            conn = self._directory.new(row, turned=index == SERVICE)
            self._directory.register(conn, row.netns)
        self._directory.displace(conn, row.netns, index)
        set_syn(conn, syn)
        return conn

    def learn_port(self, end: End, row: Any) -> None:
        """Note the chosen source port, and join what its packets have shown before."""
        own = end.conn
        end.named = True
        own.client = (shared(row.saddr), row.sport)
        own.service = (shared(row.daddr), row.dport)
        syn = syn_of(row)
        known = self._directory.find(row.netns, own.client, own.service)
        conn = _free(known, CLIENT, row.netns, syn)
        if conn is None:
            self._directory.register(own, row.netns)
        else:
            self._merge(end, conn, row)
        self._directory.displace(end.conn, row.netns, CLIENT)
        set_syn(end.conn, syn)

    def _merge(self, end: End, conn: Connection, row: Any) -> None:
        """Join an end of which only the call is known to `conn`, which has all else."""
        own = end.conn
        conn.ends = (end, conn.ends[SERVICE]) if end.index == CLIENT else (conn.ends[CLIENT], end)
        end.conn = conn
        for number, at in enumerate(own.stamps):
            if at is not None:
                conn.stamps[number] = at
        conn.first_ns = min(own.first_ns, conn.first_ns)
        conn.began = conn.began or own.began
        conn.cut = conn.cut and own.cut
        conn.successor = conn.successor or own.successor
        self._directory.release(own)
        self._directory.remove(own)
        own.ends[1 - end.index].leave()
        _attach(end, row)

    def identify(self, end: End, row: Any, syn: int) -> None:
        """Find the right connection by the number of the client's SYN."""
        conn = end.conn
        begin = conn.flows[CLIENT].syn
        if begin == syn:
            if end.index == CLIENT:
                conn.unsure = False
            return
        same = [
            one
            for one in self._directory.find(row.netns, conn.client, conn.service)
            if one.flows[CLIENT].syn == syn and not one.over and not one.ends[end.index].sock
        ]
        # The other end's socket stays with what it was joined to.
        if begin >= 0 or (same and conn.ends[1 - end.index].sock):
            self._part(end, row)
        if same:
            self._merge(end, same[0], row)
        set_syn(end.conn, syn)

    def _part(self, end: End, row: Any) -> None:
        """Part an end from what is another connection's, by the same addresses."""
        conn = end.conn
        own = self._directory.new(row, turned=end.index == SERVICE)
        other = End(conn, end.index)
        number = CONNECT_CALLED if end.index == CLIENT else HANDSHAKE_DONE
        own.stamps[number], conn.stamps[number] = conn.stamps[number], None
        own.first_ns, own.began, own.cut = conn.first_ns, conn.began, conn.cut
        if end.index == CLIENT:
            conn.ends, own.ends = (other, conn.ends[SERVICE]), (end, own.ends[SERVICE])
        else:
            conn.ends, own.ends = (conn.ends[CLIENT], other), (own.ends[CLIENT], end)
        conn.unsure = False
        end.conn = own
        self._directory.register(own, row.netns)
        _attach(end, row)


def _attach(end: End, row: Any) -> None:
    """Note the socket of a row as an end's."""
    end.conn.guessed = False
    end.sock = row.sock
    end.streams = end.streams or row.probe in _STREAM_PROBES
    end.netns = row.netns
    update_user(end, row)
    # What was taken for this end's from packets, was not: of a router between, say.
    sends, receives = end.conn.flows[end.index], end.conn.flows[1 - end.index]
    if sends.tx_netns not in (None, row.netns):
        sends.tx, sends.tx_dev = NOT_SEEN, None
    sends.tx_netns = row.netns
    if receives.rx_netns not in (None, row.netns):
        receives.nic, receives.ip, receives.rx_if = NOT_SEEN, NOT_SEEN, None
    receives.rx_netns = row.netns


def update_user(end: End, row: Any) -> Process:
    """Return the process of a call, and note it as the end's: it may have changed."""
    if row.pid is not None or end.process is NO_PROCESS:
        process = Process(row.pid, shared(row.comm))
        if process != end.process:
            end.process = process
    return end.process


def _free(known: Sequence[Connection], index: int, netns: Any, syn: int) -> Connection | None:
    """Return which of some connections by the same addresses a socket is an end of.

    Args:
        known: As _find() has them.
        index: Which end.
        netns: Where the socket is.
        syn: Number of the client's SYN; -1 if the row does not have it.
    """
    likely = []
    for conn in reversed(known):
        if conn.over or conn.ends[index].sock:
            continue
        begin = conn.flows[CLIENT].syn
        if syn >= 0 and begin >= 0:
            if begin == syn:
                return conn
        elif not conn.replaced:
            likely.append(conn)
    return likeliest(likely, known, index, netns)


def set_syn(conn: Connection, syn: int) -> None:
    """Note the number of the client's SYN, unless it is -1 (unknown) or known."""
    flow = conn.flows[CLIENT]
    if syn >= 0 and flow.syn < 0:
        flow.syn = syn
        if flow.begin < 0:
            flow.begin = flow.at(syn) + 1
        conn.doubtful = False


def goes_again(end: End, row: Any) -> bool:
    """Return whether a row of a known socket begins another connection."""
    if row.point == "connect":
        # Its change of state may be reported first, where both have the same instant.
        return end.called or end.state != "TCP_SYN_SENT"
    if listens(row):
        return True
    return calls(row) and not (end.called and end.state is None)
