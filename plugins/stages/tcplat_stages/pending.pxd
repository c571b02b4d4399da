cimport cython

from .connection cimport Connection
from .exchange cimport Exchange
from .losses cimport Losses
from .samples cimport Tally
from .turns cimport Turns, note_longest

cdef long long NO_INSTANT
cdef Py_ssize_t CLIENT, SERVICE, CLIENT_SENT, REQUEST_TX, REQUEST_RX, REQUEST_IP, REQUEST_READY
cdef Py_ssize_t REQUEST_READ, REPLY_SENT, REPLY_TX, REPLY_RX, REPLY_IP, REPLY_READ
cdef tuple MILESTONES

cdef class Pending:
    cdef public long long[::1] stamps
    cdef public list by
    cdef public long long request_begin, request_end, reply_begin, replied_ns
    cdef Connection _conn
    cdef Turns _turns
    cdef Losses _losses
    cdef list _by, _histograms
    cdef long long _known, _version
    cpdef begin_request(self, long long begin, long long end, long long sent_ns, long long tx_ns)
    cpdef come(self, long long nic_ns, long long ip_ns, long long ready_ns, long long read_ns)
    cpdef begin_reply(self, long long at, long long ts_ns)
    @cython.locals(number=cython.int)
    cpdef forget_reply(self)
    @cython.locals(tally=Tally)
    cpdef tell(
        self, long long end, long long tx_ns, long long nic_ns, long long ip_ns, long long read_ns
    )
    @cython.locals(
        conn=Connection,
        known=cython.longlong,
        place=cython.Py_ssize_t,
        number=cython.int,
        at_ns=cython.longlong,
        began_ns=cython.longlong,
        before_ns=cython.longlong,
        next_ns=cython.longlong,
        histograms=list,
        outcomes=dict,
    )
    cdef bint _count(self, Tally tally)
    @cython.locals(exchange=Exchange, stamps=list, number=cython.int, at=cython.longlong)
    cpdef Exchange exchange(self)
