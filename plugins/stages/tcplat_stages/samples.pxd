cimport cython

from .chain cimport Split
from .duration_histogram cimport DurationHistogram
from .exchange cimport Exchange

@cython.locals(split=Split, parts=list)
cpdef list samples(Exchange exchange)
@cython.locals(histogram=DurationHistogram)
cpdef count(Exchange exchange, dict histograms, weight)

cdef class Tally:
    cdef public long long version
    cdef object _find
    cpdef list histograms(self, Exchange exchange, long long known)
    cdef add(self, DurationHistogram histogram, long long ns)
