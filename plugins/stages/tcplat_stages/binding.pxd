from .connection cimport Connection, End
from .directory cimport Directory

cdef class Binder:
    cdef public Directory _directory

cpdef update_user(End end, row)
cpdef set_syn(Connection conn, long long syn)
cpdef bint goes_again(End end, row)
