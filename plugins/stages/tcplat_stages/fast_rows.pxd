cimport cython

from .connection cimport End
from .directory cimport Directory
from .fast_path cimport FastPath
from .losses cimport Losses
from .row_fields cimport Look

cdef int _OTHER, _IGNORED, _FIRST_PACKET, _AT_IP
cdef long long BEYOND_NS, _MOST_BYTES

cdef class Way:
    cdef public FastPath fast_path
    cdef public int index
    cdef public object netns

cdef class FastPaths:
    cdef list _users, _flags, _ways, _ends, _hooks, _codes
    cpdef begin(self, batch)
    cdef bint may_take(self, Look look)
    @cython.locals(code=cython.int, text=str, bare=cython.bint, fast_path=FastPath)
    cdef bint take(self, Look look, Directory directory, Losses losses)
    @cython.locals(end=End, fast_path=FastPath, taken=cython.bint)
    cdef FastPath _take_of_socket(self, int code, Look look, Directory directory, Losses losses)
    @cython.locals(way=Way, fast_path=FastPath, taken=cython.bint)
    cdef FastPath _take_packet(self, int code, Look look, Directory directory, Losses losses)
    @cython.locals(way=Way, found=tuple)
    cdef Way _way(self, Py_ssize_t place, dict by_packet)
