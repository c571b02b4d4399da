from .connection cimport Connection, End
from .losses cimport Losses
from .turns cimport Turns

cdef class Directory:
    cdef public dict conns, by_sock, done, by_addresses, by_packet, _bare
    cdef public long long given_up, closed_windows, _most, _most_bare, _number
    cdef public Turns _turns
    cdef public Losses _losses
    cdef public object _over
    cpdef finish(self, Connection conn, str why)
    cpdef retire(self, End end, long long ts_ns)
