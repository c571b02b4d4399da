cimport cython

from .connection cimport Connection
from .pending cimport Pending
from .plain cimport has_more, is_at, is_in, lacks, last
from .socket_rows cimport think
from .stream cimport Flow, Reach, added, caller
from .turns cimport Turns, prune, queued_up_to

cdef int _SEND, _READY, _NIC_TX, _NIC_RX, _RX_IP
cdef long long NO_INSTANT, LARGEST_WINDOW
cdef Py_ssize_t CLIENT, SERVICE, LONG

cdef class FastPath:
    cdef public bint active
    cdef public long long told
    cdef public Connection conn
    cdef Pending _pending
    cdef Flow _request, _reply
    cdef bint _client, _asking, _parts
    cdef list _users
    cdef long long _ask_ns, _asked_ns, _asked_tx_ns, _asked_nic_ns, _asked_ip_ns
    cdef long long _asked_ready_ns, _asked_read_ns
    cdef long long _sent_ns, _tx_ns, _nic_ns, _ip_ns, _read_ns
    cpdef bint take_of_socket(
        self, int code, int index, long long ts_ns, long long seq, long long count, user
    )
    cdef bint _is_same(self, int index, user)
    @cython.locals(conn=Connection, flow=Flow, at=cython.longlong)
    cdef bint _take_request(self, long long ts_ns, long long seq, long long count)
    @cython.locals(flow=Flow, copied=cython.longlong, finish=cython.longlong, reach=Reach)
    cdef bint _take_ready(self, long long ts_ns, long long seq, long long count)
    @cython.locals(flow=Flow, at=cython.longlong, finish=cython.longlong)
    cdef bint _take_read(self, long long ts_ns, long long seq, long long count)
    @cython.locals(flow=Flow, at=cython.longlong)
    cdef bint _take_reply(self, long long ts_ns, long long seq, long long count)
    @cython.locals(conn=Connection, request=Flow, asked=cython.longlong, pending=Pending)
    cdef bint _answer(self, long long at, long long ts_ns)
    @cython.locals(flow=Flow, at=cython.longlong, finish=cython.longlong)
    cdef bint _take_reply_read(self, long long ts_ns, long long seq, long long count)
    @cython.locals(
        flow=Flow,
        other=Flow,
        at=cython.longlong,
        finish=cython.longlong,
        leaves=cython.bint,
        reach=Reach,
    )
    cpdef bint take_packet(
        self,
        int code,
        int index,
        long long ts_ns,
        long long seq,
        long long count,
        long long ack,
        long long window,
        netns,
    )
    cdef _note_packet(self, int code, int index, Reach reach, long long ts_ns)
    cdef _add_part(self, int index, Reach reach, long long ts_ns)
    cdef list _with_part(self, int index, list log, long long position, long long ts_ns)
    @cython.locals(reply=Flow)
    cdef bint _asks(self)
    @cython.locals(conn=Connection, request=Flow, reply=Flow)
    cpdef leave(self)

cdef write(Reach reach, long long ts_ns)
