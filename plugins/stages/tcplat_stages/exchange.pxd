from .chain cimport Split

# `conn` has no type here: connection.py imports this module.
cdef class Exchange:
    cdef public Split _split
    cdef public object conn, over_ns, parted
    cdef public str ended, kind, outcome, over_by
    cdef public tuple urgent
    cdef public bint beyond, missed
    cdef public list by, stamps
    cdef public long long number, retransmits, zero_windows
    cdef public long long replied_ns, reply_begin, reply_end, request_begin, request_end
    cpdef Split divide(self)
    cpdef process(self, Py_ssize_t index)
