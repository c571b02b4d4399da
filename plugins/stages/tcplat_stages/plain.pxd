cimport cython

from .connection cimport Connection
from .exchange cimport Exchange
from .losses cimport Losses
from .stream cimport Flow, Reach

@cython.locals(pending=Exchange, request=Flow, reply=Flow)
cpdef bint may_begin(Connection conn, Losses losses)
cpdef long long last(list log)
cpdef bint is_in(Reach reach, long long position)
cpdef bint is_at(Flow flow, long long position)
cpdef bint has_more(Flow flow, long long position)
cpdef bint lacks(Flow flow, long long position)
