from .connection cimport Connection

cpdef note_fin(Connection conn, int index)
cpdef note_rst(Connection conn, int index)
cpdef note_bytes(Connection conn, int index, long long finish)
cpdef take_back(Connection conn)
cpdef settle_rst(Connection conn)
cpdef note_reset(Connection conn, int index)
