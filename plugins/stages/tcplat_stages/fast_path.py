"""The fast path: requests that are sent, read and answered in order, as numbers (D139).

Most rows of a busy server are of such plain turns. The fast path takes them without an object for
each row: positions go into the connection's streams as everywhere, instants are kept here, and an
exchange is made of them when it is over, or only counted. The rules are those of `socket_rows`,
`packet_rows` and `turns`, where these have nothing to decide. A row that is not plain takes its
connection off the fast path first: then everything is as if each row had been taken there.
"""

from __future__ import annotations

from typing import Any

from .acceptable import LARGEST_WINDOW
from .connection import Connection
from .losses import Losses
from .pending import Pending
from .plain import NO_INSTANT, has_more, is_at, is_in, lacks, last
from .socket_rows import think
from .stream import CLIENT, NOT_SEEN, SERVICE, Log, Reach, added, caller
from .turns import LONG, Turns, prune, queued_up_to

SEND, RECV, READY, NIC_TX, NIC_RX, RX_IP = range(2, 8)
"""Points, as numbers."""
_SEND, _READY, _NIC_TX, _NIC_RX, _RX_IP = SEND, READY, NIC_TX, NIC_RX, RX_IP
"""The same: what has a C type cannot be imported."""
_MOST_PAUSE = 4_096
"""Exchanges until a connection is on the fast path again, at most."""
_LASTED = 16
"""Exchanges after which it was worth it."""


class FastPath:
    """A connection's turns, as long as they are plain.

    A turn begins with the first row of a request, and ends where the next one begins. The exchange
    that is under way, or was last, is the pending one: it is told when the next reply begins.
    A client that is not watched is fine, a service that is not is not.

    Attributes:
        active: It is the one of its connection.
    """

    def __init__(self, conn: Connection, turns: Turns, losses: Losses) -> None:
        """Begin where a reply is being sent, or is read; see may_begin()."""
        assert conn.replying is not None  # noqa: S101 - may_begin() has looked
        self.active = True
        self.told = 0
        self.conn: Any = conn
        self._pending = Pending(conn.replying, turns, losses)
        self._request, self._reply = conn.flows
        self._client = conn.ends[CLIENT].sock != 0
        self._users: list[Any] = [None, None]
        self._asking = self._parts = False
        self._ask_ns = self._asked_ns = self._asked_tx_ns = self._asked_nic_ns = NO_INSTANT
        self._asked_ip_ns = self._asked_ready_ns = self._asked_read_ns = NO_INSTANT
        reply = self._reply
        self._sent_ns = last(reply.sends)
        self._tx_ns = last(reply.tx.log)
        self._nic_ns = last(reply.nic.log)
        self._ip_ns = last(reply.ip.log)
        self._read_ns = last(reply.reads)
        self._request.drop_instants()
        reply.drop_instants()
        conn.replying = None
        conn.fast_path = self

    def take_of_socket(
        self, code: int, index: int, ts_ns: int, seq: int, count: int, user: Any
    ) -> bool:
        """Take a row of the socket at an end; False if it is not plain, and nothing was taken.

        `user` is as in SlimRows, the numbers are those of Look.
        """
        if code == _READY:
            return index == SERVICE and self._take_ready(ts_ns, seq, max(count, 0))
        if count <= 0 or (user is not self._users[index] and not self._is_same(index, user)):
            return False
        if code == _SEND:
            if index == SERVICE:
                return self._take_reply(ts_ns, seq, count)
            return self._take_request(ts_ns, seq, count)
        if index == SERVICE:
            return self._take_read(ts_ns, seq, count)
        return self._take_reply_read(ts_ns, seq, count)

    def _is_same(self, index: int, user: Any) -> bool:
        """Return whether a call is of the process that has used the end before."""
        process = self.conn.ends[index].process
        if user[0] != process.pid or user[2] != process.comm:
            return False
        self._users[index] = user
        return True

    def _take_request(self, ts_ns: int, seq: int, count: int) -> bool:
        """Take a send of the client."""
        conn, flow = self.conn, self._request
        at = flow.near(seq)
        if at != flow.sent or has_more(flow, at) or not self._asks():
            return False
        if self._asked_ns >= 0:
            flow.sends = self._with_part(CLIENT, flow.sends, flow.sent, self._asked_ns)
        flow.ref = max(flow.ref, at)
        flow.last_send = at
        flow.sent = at + count
        self._asked_ns = ts_ns
        if self._ask_ns < 0:
            self._ask_ns = ts_ns
            conn.thought_ns = 0
            think(conn, ts_ns)
        return True

    def _take_ready(self, ts_ns: int, seq: int, count: int) -> bool:
        """Take a wake-up of the service."""
        flow = self._request
        copied = flow.near(seq)
        finish = copied + count
        reach = flow.ready
        if copied > flow.read or (self._client and finish > flow.sent) or reach is NOT_SEEN:
            return False
        if finish > reach.position:
            if not self._asks():
                return False
            self._add_part(CLIENT, reach, self._asked_ready_ns)
            reach.position = finish
            self._asked_ready_ns = ts_ns
        flow.ref = max(flow.ref, copied)
        flow.copied = max(flow.copied, copied)
        return True

    def _take_read(self, ts_ns: int, seq: int, count: int) -> bool:
        """Take a read of the service."""
        flow = self._request
        at = flow.near(seq)
        finish = at + count
        if at != flow.read or (self._client and finish > flow.sent) or lacks(flow, finish):
            return False
        if not self._asks():
            return False
        if self._asked_read_ns >= 0:
            flow.reads = self._with_part(CLIENT, flow.reads, flow.read, self._asked_read_ns)
        flow.ref = max(flow.ref, at)
        flow.read, flow.read_ns = finish, ts_ns
        self._asked_read_ns = ts_ns
        return True

    def _take_reply(self, ts_ns: int, seq: int, count: int) -> bool:
        """Take a send of the service: it begins a reply, or goes on with one."""
        flow = self._reply
        at = flow.near(seq)
        if at != flow.sent or has_more(flow, at):
            return False
        if self._asking and not self._answer(at, ts_ns):
            return False
        flow.ref = max(flow.ref, at)
        flow.last_send = at
        flow.sent = at + count
        self._sent_ns = ts_ns
        return True

    def _answer(self, at: int, ts_ns: int) -> bool:
        """Begin a reply at `at` to all that was asked, if all of that was read."""
        conn, request = self.conn, self._request
        asked = request.read
        if asked <= conn.answered or request.copied > asked or not is_at(request, asked):
            return False
        if (self._client and request.sent != asked) or not is_in(request.ready, asked):
            return False
        pending = self._pending
        if pending.reply_begin >= at:
            return False
        self.told += 1
        pending.tell(at, self._tx_ns, self._nic_ns, self._ip_ns, self._read_ns)
        pending.begin_request(conn.answered, asked, self._ask_ns, self._asked_tx_ns)
        pending.come(
            self._asked_nic_ns, self._asked_ip_ns, self._asked_ready_ns, self._asked_read_ns
        )
        pending.begin_reply(at, ts_ns)
        conn.answered = asked
        conn.came = queued_up_to(conn)
        self._asking = False
        self._ask_ns = self._asked_ns = self._asked_tx_ns = self._asked_nic_ns = NO_INSTANT
        self._asked_ip_ns = self._asked_ready_ns = self._asked_read_ns = NO_INSTANT
        self._tx_ns = self._nic_ns = self._ip_ns = self._read_ns = NO_INSTANT
        if self._parts:
            self._parts = False
            request.trim(asked + 1)
            self._reply.trim(at + 1)
        return True

    def _take_reply_read(self, ts_ns: int, seq: int, count: int) -> bool:
        """Take a read of the client."""
        flow = self._reply
        at = flow.near(seq)
        finish = at + count
        if self._asking or at != flow.read or finish > flow.sent or lacks(flow, finish):
            return False
        if self._read_ns >= 0:
            flow.reads = self._with_part(SERVICE, flow.reads, flow.read, self._read_ns)
        flow.ref = max(flow.ref, at)
        flow.read, flow.read_ns = finish, ts_ns
        self._read_ns = ts_ns
        return True

    def take_packet(  # noqa: C901, PLR0911, PLR0912 - each thing that is not plain
        self,
        code: int,
        index: int,
        ts_ns: int,
        seq: int,
        count: int,
        ack: int,
        window: int,
        netns: Any,
    ) -> bool:
        """Take a packet with an ACK and no other flag but PSH; False if it is not plain.

        `index` is the end that sent it, `netns` where it was seen; the numbers are those of Look.
        """
        flow, other = self._request, self._reply
        if index == SERVICE:
            flow, other = other, flow
        at = flow.near(seq)
        leaves = code == _NIC_TX
        own = flow.tx_netns if leaves else flow.rx_netns
        if own is None or count < 0 or window == 0 or at > flow.ref + LARGEST_WINDOW:
            return False
        if netns != own:
            return True  # on its way only
        finish = at + count
        reach = flow.tx if leaves else flow.nic if code == _NIC_RX else flow.ip
        if count:
            if at != reach.position or reach.position < 0 or (index and self._asking):
                return False
            if finish > flow.sent and (index or self._client):
                return False
            if ack >= 0:
                ack = other.near(ack)
                if lacks(other, ack):
                    return False
            if index == CLIENT and not self._asks():
                return False
            self._note_packet(code, index, reach, ts_ns)
            if ack >= 0:
                other.ref = max(other.ref, ack)
            flow.ref = max(flow.ref, at)
            reach.position = finish
        if code != _RX_IP and (leaves or flow.tx_netns is None):
            if window > flow.widest:
                flow.widest = min(window, LARGEST_WINDOW)
        elif not flow.widest:
            flow.widest = min(max(window, 0), LARGEST_WINDOW)
        return True

    def _note_packet(self, code: int, index: int, reach: Reach, ts_ns: int) -> None:
        """Note when a packet with data came to a point."""
        if index == SERVICE:
            if code == _NIC_TX:
                self._add_part(index, reach, self._tx_ns)
                self._tx_ns = ts_ns
            elif code == _NIC_RX:
                self._add_part(index, reach, self._nic_ns)
                self._nic_ns = ts_ns
            else:
                self._add_part(index, reach, self._ip_ns)
                self._ip_ns = ts_ns
        elif code == _NIC_TX:
            self._add_part(index, reach, self._asked_tx_ns)
            self._asked_tx_ns = ts_ns
        elif code == _NIC_RX:
            self._add_part(index, reach, self._asked_nic_ns)
            self._asked_nic_ns = ts_ns
        else:
            self._add_part(index, reach, self._asked_ip_ns)
            self._asked_ip_ns = ts_ns

    def _add_part(self, index: int, reach: Reach, ts_ns: int) -> None:
        """Keep when a part of a message came to a point, if one has: more of it comes now."""
        if ts_ns >= 0:
            reach.log = self._with_part(index, reach.log, reach.position, ts_ns)

    def _with_part(self, index: int, log: Log, position: int, ts_ns: int) -> Log:
        """Return a log of a message that has come up to `position` so far."""
        self._parts = True
        if len(log) > LONG:
            prune(self.conn, index)
        return added(log, position, ts_ns)

    def _asks(self) -> bool:
        """Begin the next turn, unless it has begun. False if the last reply is on its way yet."""
        if self._asking:
            return True
        reply = self._reply
        if (self._client and reply.read != reply.sent) or not is_at(reply, reply.sent):
            return False
        self._asking = True
        return True

    def leave(self) -> None:
        """Put all into the connection: the next row of it is not plain, or it ends."""
        conn, request, reply = self.conn, self._request, self._reply
        self.active = False
        self._pending.forget_reply()  # the logs have its instants
        conn.replying = self._pending.exchange()
        write(reply.tx, self._tx_ns)
        write(reply.nic, self._nic_ns)
        write(reply.ip, self._ip_ns)
        write(request.tx, self._asked_tx_ns)
        write(request.nic, self._asked_nic_ns)
        write(request.ip, self._asked_ip_ns)
        write(request.ready, self._asked_ready_ns)
        if self._sent_ns >= 0:
            reply.sends = added(reply.sends, reply.sent, self._sent_ns)
        if self._read_ns >= 0:
            reply.reads = added(reply.reads, reply.read, self._read_ns)
        if self._asked_ns >= 0:
            request.sends = added(request.sends, request.sent, self._asked_ns)
        if self._asked_read_ns >= 0:
            request.reads = added(request.reads, request.read, self._asked_read_ns)
        conn.ask_ns = self._ask_ns if self._ask_ns >= 0 else None
        conn.ask_by = caller(request.senders, conn.answered)
        # One that does not stay is tried less and less often.
        pause = 1 if self.told >= _LASTED else min(2 * conn.fast_pause, _MOST_PAUSE)
        conn.fast_pause, conn.fast_from = pause, conn.reported + pause
        conn.fast_path = None
        self.conn = None


def write(reach: Reach, ts_ns: int) -> None:
    """Put the last instant into the log of a point."""
    if ts_ns >= 0:
        reach.log = added(reach.log, reach.position, ts_ns)
