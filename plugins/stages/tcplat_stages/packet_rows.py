"""What packets show: how far a stream has come where, handshakes, windows, ends."""

from __future__ import annotations

from typing import Any

from .acceptable import LARGEST_WINDOW, is_stray, may_reset
from .binding import set_syn
from .chain import SYN_RX, SYN_TX, SYNACK_RX, SYNACK_TX
from .closing import note_bytes, note_fin, note_rst
from .connection import Connection
from .directory import Directory
from .losses import KINDS, PACKET_ROWS, resumes
from .row_fields import device, opens, shared, whole
from .stream import CLIENT, NOT_SEEN, SERVICE, Flow, Reach
from .turns import LONG, Turns, prune

PLAIN = frozenset({"ACK", "PSH|ACK"})
"""Flags of a packet that neither begins nor ends anything."""


class PacketRows:
    """What follows from packets."""

    def __init__(self, directory: Directory, turns: Turns) -> None:
        self._directory = directory
        self._turns = turns

    def take(  # noqa: C901 - called for each packet
        self, conn: Connection, index: int, row: Any, ts_ns: int, point: str, flags: str
    ) -> None:
        """Take a packet of a connection, sent by the end `index`."""
        flow = conn.flows[index]
        count = row.bytes
        if (count or "FIN" in flags) and is_stray(conn, index, row):
            return
        netns = row.netns
        leaves = point == "nic_tx"
        # Elsewhere it is on its way only: a bridge, a router, the other end of a veth.
        if leaves:
            if netns != flow.tx_netns:
                if flow.tx_netns is not None:
                    return
                flow.tx_netns = netns
        elif netns != flow.rx_netns:
            if flow.rx_netns is not None:
                return
            flow.rx_netns = netns
        if flags not in PLAIN:
            self._flags(conn, index, row, ts_ns, point, flags)
        if point != "rx_ip" and (leaves or flow.tx_netns is None):
            self._window(conn, flow, row, flags)
        elif not flow.widest and "SYN" not in flags:
            flow.widest = min(whole(row, "window") or 0, LARGEST_WINDOW)
        if count:
            # A SYN has a number of its own, before that of the first byte.
            at = flow.at(row.seq + 1 if "SYN" in flags else row.seq)
            ack = whole(row, "ack")
            if ack is not None and "ACK" in flags:
                self._acked(conn, index, ack)
            self._data(conn, index, row, ts_ns, at, at + count)

    def _acked(self, conn: Connection, index: int, ack: int) -> None:
        """Note that what an end acknowledges has come to it."""
        flow = conn.flows[1 - index]
        if flow.ref < 0:
            return
        acked = flow.at(ack)
        if flow.fin >= 0:
            acked = min(acked, flow.fin)
        for reach in (flow.nic, flow.ip):
            if 0 <= reach.position < acked:
                reach.skip(acked)
        if index == CLIENT and conn.waiting:
            self._turns.come(conn)

    def _data(  # noqa: C901, PLR0912 - three points, each with the same few steps
        self, conn: Connection, index: int, row: Any, ts_ns: int, at: int, finish: int
    ) -> None:
        """Take a packet's payload, from `at` to `finish`."""
        flow = conn.flows[index]
        point = row.point
        if flow.begin < 0:
            flow.begin = at
        if conn.closing_ns:
            note_bytes(conn, index, finish)
        if conn.missed:
            number = KINDS.index(point)
            before = (flow.tx, flow.nic, flow.ip)[number].position
            # Where both ends have rows of sockets, the turns are theirs.
            alone = not (conn.ends[CLIENT].sock and conn.ends[SERVICE].sock)
            kind = 1 << PACKET_ROWS + len(KINDS) * index + number
            resumes(conn, kind, gap=alone and at > before >= 0)
        if point == "nic_tx":
            reach = flow.tx
            if reach is NOT_SEEN:
                reach = flow.tx = Reach()
            name = device(row)
            flow.tx_dev = flow.tx_dev or shared(name)
            if not reach.pass_by(at, finish, ts_ns) and flow.tx_dev == name:
                _again(conn, index, at)
        elif point == "nic_rx":
            reach = flow.nic
            if reach is NOT_SEEN:
                reach = flow.nic = Reach()
            flow.rx_if = flow.rx_if or shared(row.ifname)
            come = reach.arrive(at, finish, ts_ns, flow.begin)
            if not come and flow.tx_netns is None and flow.rx_if == row.ifname:
                _again(conn, index, at)
        else:
            reach = flow.ip
            if reach is NOT_SEEN:
                reach = flow.ip = Reach()
            reach.arrive(at, finish, ts_ns, flow.begin)
        if len(reach.log) > LONG:
            prune(conn, index)
        if index == SERVICE:
            # Of what is new, a later packet may come first.
            self._turns.replied(conn, flow.sent if flow.sent >= 0 else at, finish)
        elif conn.answered < 0:
            conn.answered = flow.begin  # not `at`: a later packet may come first

    def _flags(
        self, conn: Connection, index: int, row: Any, ts_ns: int, point: str, flags: str
    ) -> None:
        if "SYN" in flags:
            _syn(conn, index, row, ts_ns, point, flags)
        if "FIN" in flags:
            flow = conn.flows[index]
            flow.fin = flow.at(row.seq) + (row.bytes or 0)
            note_fin(conn, index)
            if len(conn.fins) > 1:
                conn.closing_ns = ts_ns
            note_bytes(conn, index, flow.fin + 1)
        if "RST" in flags and may_reset(conn, index, row):
            note_rst(conn, index)
            conn.closing_ns = ts_ns

    def _window(self, conn: Connection, flow: Flow, row: Any, flags: str) -> None:
        window = whole(row, "window")
        if window is None or "RST" in flags:
            return
        if window:
            if window > flow.widest and "SYN" not in flags:
                flow.widest = min(window, LARGEST_WINDOW)
            if flow.zero:
                flow.zero = False
                self._directory.closed_windows -= 1
        elif not flow.zero:
            flow.zero = True
            self._directory.closed_windows += 1
            flow.zero_windows += 1
            if conn.replying is not None:
                conn.replying.zero_windows += 1
            else:
                conn.ask_zeros += 1


def _syn(conn: Connection, index: int, row: Any, ts_ns: int, point: str, flags: str) -> None:
    flow = conn.flows[index]
    conn.began, conn.cut = True, False
    if index == CLIENT:
        set_syn(conn, row.seq)
    elif flow.syn < 0:
        flow.syn = row.seq
        if flow.begin < 0:
            flow.begin = flow.at(row.seq) + 1
    if opens(flags):
        number = SYN_TX if point == "nic_tx" else SYN_RX
    else:
        number = SYNACK_TX if point == "nic_tx" else SYNACK_RX
    if conn.stamps[number] is None:
        conn.stamps[number] = ts_ns
        if point == "nic_tx":
            flow.tx_dev = shared(device(row))
        elif point == "nic_rx":
            flow.rx_if = shared(row.ifname)
    elif index == CLIENT and (
        (point == "nic_tx" and flow.tx_dev == device(row))
        or (point == "nic_rx" and flow.tx_dev is None and flow.rx_if == row.ifname)
    ):
        conn.syns += 1


def _again(conn: Connection, index: int, at: int) -> None:
    """Count a retransmission of bytes from `at` on."""
    conn.flows[index].retransmits += 1
    under_way = [*conn.waiting, *([conn.replying] if conn.replying else ())]
    for exchange in under_way:
        if index == CLIENT and exchange.request_begin <= at < exchange.request_end:
            exchange.retransmits += 1
            return
        if (
            index == SERVICE
            and exchange.reply_begin <= at
            and (exchange.reply_end < 0 or at < exchange.reply_end)
        ):
            exchange.retransmits += 1
            return
    if index == CLIENT:
        conn.ask_retransmits += 1
