cimport cython

cdef class DurationHistogram:
    cdef public object counts, sum_ns, weight, weighted_ns, max_ns, min_ns
    cdef public long long count
    @cython.locals(shift=cython.int)
    cpdef add(self, ns, weight=*)
