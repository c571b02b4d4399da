cimport cython

from .acceptable cimport is_stray
from .connection cimport Connection
from .directory cimport Directory
from .row_fields cimport Slim, whole
from .stream cimport Flow, Reach
from .turns cimport Turns, prune

cdef class PacketRows:
    cdef public Directory _directory
    cdef public Turns _turns
    @cython.locals(flow=Flow, at=cython.longlong, leaves=cython.bint)
    cpdef take(self, Connection conn, int index, Slim row, long long ts_ns, str point, str flags)
    @cython.locals(flow=Flow, acked=cython.longlong, reach=Reach)
    cpdef _acked(self, Connection conn, int index, long long ack)
    @cython.locals(flow=Flow, reach=Reach, before=cython.longlong, kind=cython.int)
    cpdef _data(
        self, Connection conn, int index, Slim row, long long ts_ns, long long at, long long finish
    )
    cpdef _window(self, Connection conn, Flow flow, Slim row, str flags)
