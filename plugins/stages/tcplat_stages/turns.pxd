cimport cython

from .connection cimport Connection
from .exchange cimport Exchange
from .losses cimport Losses
from .samples cimport Tally
from .stream cimport Flow, Reach, caller, reached

# What is imported has these C types here.
cdef Py_ssize_t CLIENT, SERVICE, CLIENT_SENT, REQUEST_TX, REQUEST_RX, REQUEST_IP, REQUEST_READY, REQUEST_READ
cdef Py_ssize_t REPLY_SENT, REPLY_TX, REPLY_RX, REPLY_IP, REPLY_READY, REPLY_READ

cdef class Turns:
    cdef public list finished, _undecided
    cdef public dict longest
    cdef public Tally tally
    cdef public long long last_ns, cut, unsampled, untimed, missed
    cdef public bint resampled, _leaving
    cdef public Losses _losses
    @cython.locals(flow=Flow)
    cpdef replied(self, Connection conn, long long at, long long finish)
    @cython.locals(exchange=Exchange, asked=cython.longlong, came=cython.longlong)
    cpdef reply(self, Connection conn, long long at, ts_ns)
    @cython.locals(request=Flow, old=Exchange, exchange=Exchange)
    cpdef _answer(self, Connection conn, long long at, ts_ns, long long asked)
    @cython.locals(flow=Flow, copied=cython.longlong, replying=Exchange)
    cpdef settle(self, Connection conn, str why=*)
    @cython.locals(exchange=Exchange)
    cpdef Exchange _begin(self, Connection conn, str kind, long long end)
    @cython.locals(conn=Connection)
    cpdef end_reply(self, Exchange exchange, long long end, str why)
    @cython.locals(first=Exchange)
    cpdef come(self, Connection conn)
    @cython.locals(conn=Connection, flow=Flow, end=cython.longlong, stamps=list, farewell=Exchange)
    cpdef _complete(self, Exchange exchange, str why=*)
    @cython.locals(conn=Connection, request=Flow, reply=Flow, cut=cython.bint, total_ns=cython.longlong, known=cython.int)
    cpdef tell(self, Exchange exchange)

@cython.locals(request=Flow)
cpdef _ask_from(Connection conn, long long asked)
@cython.locals(flow=Flow, arrived=cython.longlong, ready=cython.longlong)
cpdef long long queued_up_to(Connection conn)
@cython.locals(flow=Flow, arrived=cython.longlong)
cpdef long long read_up_to(Connection conn)
@cython.locals(conn=Connection, flow=Flow, stamps=list)
cpdef _arrived(Exchange exchange, long long end)
@cython.locals(flow=Flow, arrived=cython.longlong)
cpdef bint has_come(Connection conn, long long end)
@cython.locals(flow=Flow, needed=cython.longlong)
cpdef prune(Connection conn, int index)
@cython.locals(reply=Flow)
cpdef end_idle(Turns turns, Connection conn)
cpdef note_longest(dict longest, Connection conn)
