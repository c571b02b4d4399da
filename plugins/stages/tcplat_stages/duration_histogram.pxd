cimport cython

cdef class DurationHistogram:
    cdef public object counts, sum_ns, weight, weighted_ns
    cdef public long long count, max_ns, min_ns
    @cython.locals(shift=cython.int, bucket=cython.longlong)
    cpdef add(self, long long ns, weight=*)
