cimport cython

from .connection cimport Connection
from .directory cimport Directory
from .stream cimport Flow

cdef class PacketRouter:
    cdef public Directory _directory

@cython.locals(flow=Flow)
cpdef bint is_new(Connection conn, row)
