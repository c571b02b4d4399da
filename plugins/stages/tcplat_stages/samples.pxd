cimport cython

from .chain cimport Split
from .duration_histogram cimport DurationHistogram
from .exchange cimport Exchange

@cython.locals(split=Split, parts=list)
cpdef list samples(Exchange exchange)
@cython.locals(histogram=DurationHistogram)
cpdef count(Exchange exchange, dict histograms, weight)
