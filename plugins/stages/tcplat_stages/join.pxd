cimport cython

from .binding cimport Binder, goes_again
from .connection cimport Connection, End
from .directory cimport Directory
from .fast_path cimport FastPath
from .fast_rows cimport FastPaths
from .losses cimport Losses
from .packet_rows cimport PacketRows
from .routing cimport PacketRouter, is_new
from .plain cimport may_begin
from .row_fields cimport Look, Slim, opens, shows_window
from .socket_rows cimport SocketRows
from .turns cimport Turns

cdef long long BEYOND_NS

cdef class Joiner:
    cdef public object watch
    cdef public long long _idle_ns, _next_sweep_ns
    cdef public list _pending
    cdef public Losses _losses
    cdef public Turns _turns
    cdef public Directory directory
    cdef public Binder _binder
    cdef public PacketRouter _router
    cdef public SocketRows _sockets
    cdef public PacketRows _packets
    cdef public Slim _slim
    cdef public FastPaths _fast_paths
    @cython.locals(look=Look, fast_paths=FastPaths)
    cdef bint _take_plain(self, Py_ssize_t index)
    @cython.locals(losses=Losses)
    cdef _come_to(self, long long ts_ns)
    cpdef _take(self, Slim row)
    @cython.locals(point=str, end=End, conn=Connection)
    cpdef _take_of_socket(self, Slim row, long long ts_ns)
    @cython.locals(point=str, flags=str, key=tuple, way=tuple, conn=Connection, index=cython.int)
    cpdef _take_packet(self, Slim row, long long ts_ns)
    cpdef _pass(self, long long ts_ns)

cpdef bint _has_number(Slim row)
