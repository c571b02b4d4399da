cimport cython

cdef class Split:
    cdef public tuple stages, left_out
    cdef public long long total_ns, unexplained_ns

@cython.locals(
    names=list,
    parts=list,
    number=cython.Py_ssize_t,
    before=cython.Py_ssize_t,
    first=cython.Py_ssize_t,
    first_ns=cython.longlong,
    at_ns=cython.longlong,
    next_ns=cython.longlong,
    total_ns=cython.longlong,
)
cpdef Split split(list stamps, tuple stages=*)
cpdef Split _split_inconsistent(list stamps, tuple stages)
