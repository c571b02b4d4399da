cimport cython

from .connection cimport Connection, End
from .row_fields cimport whole
from .stream cimport Flow

@cython.locals(flow=Flow, ahead=cython.longlong, window=cython.longlong)
cpdef bint is_stray(Connection conn, int index, row)
cpdef disown(End end, Flow flow, long long at)
