cimport cython

from .acceptable cimport disown
from .binding cimport Binder, update_user
from .connection cimport Connection, End
from .directory cimport Directory
from .row_fields cimport Slim, whole
from .stream cimport Flow, Reach, caller, reached
from .turns cimport Turns, prune

# What is imported has these C types here.
cdef Py_ssize_t CLIENT, SERVICE, READS, LONG, ACCEPTED, CONNECT_CALLED, CONNECTED, HANDSHAKE_DONE

cdef class SocketRows:
    cdef public Directory _directory
    cdef public Binder _binder
    cdef public Turns _turns
    cpdef take(self, End end, Slim row, long long ts_ns, str point)
    @cython.locals(
        conn=Connection,
        flow=Flow,
        index=cython.int,
        count=cython.longlong,
        at=cython.longlong,
        finish=cython.longlong,
        known=cython.longlong,
        missed=cython.int,
        senders=list,
    )
    cpdef _send(self, End end, Slim row, long long ts_ns)
    @cython.locals(
        conn=Connection,
        flow=Flow,
        index=cython.int,
        at=cython.longlong,
        finish=cython.longlong,
    )
    cpdef _recv(self, End end, Slim row, long long ts_ns)
    @cython.locals(flow=Flow, known=cython.longlong)
    cpdef _skipped(self, Connection conn, int index, long long at)

@cython.locals(conn=Connection, flow=Flow, ready=Reach, copied=cython.longlong)
cpdef _ready(End end, Slim row, long long ts_ns)
@cython.locals(read_ns=cython.longlong, flow=Flow)
cpdef think(Connection conn, long long ts_ns)
