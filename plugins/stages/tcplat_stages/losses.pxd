from .connection cimport Connection

cdef class Losses:
    cdef public long long row_ns, count, until_ns, _blurred_ns
    cdef public list ends, _gaps
    cpdef end(self, long long ts_ns)
    cpdef mark(self, Connection conn)

cpdef resumes(Connection conn, int kind, bint gap)
cpdef tear(Connection conn)
