cimport cython

cdef long long _TURN, _HALF

cdef class Reach:
    cdef public long long position
    cdef public list log
    cdef public list late
    cpdef bint pass_by(self, long long at, long long finish, long long ts_ns)
    @cython.locals(position=cython.longlong)
    cpdef bint arrive(self, long long at, long long finish, long long ts_ns, long long begin)
    cpdef _keep(self, long long at, long long finish)
    cpdef skip(self, long long finish)
    cpdef long long _whole(self, long long finish)
    @cython.locals(log=list)
    cpdef trim(self, long long position)

cdef class Flow:
    cdef public long long begin, beside, copied, fin, last_send, read, read_ns, ref, sent, syn
    cdef public long long retransmits, strays, widest, zero_windows
    cdef public Reach ip, nic, ready, tx
    cdef public list reads, senders, sends
    cdef public object rx_if, rx_netns, tx_dev, tx_netns
    cdef public bint unseen, zero
    cdef public tuple urgent
    @cython.locals(ref=cython.longlong, at=cython.longlong)
    cpdef long long at(self, long long seq)
    cpdef long long near(self, long long seq)
    cpdef send(self, long long at, long long finish, long long ts_ns)
    cpdef take(self, long long finish, long long ts_ns)
    cpdef note_read(self, long long finish, ts_ns)
    cpdef skip_urgent(self, long long before, long long at)
    cpdef long long arrived(self)
    cpdef drop_instants(self)
    @cython.locals(sends=list, reads=list, senders=list)
    cpdef trim(self, long long position)

@cython.locals(begin=cython.longlong)
cpdef caller(list callers, long long position)
cpdef list added(list log, long long finish, ts_ns)
@cython.locals(
    first=cython.Py_ssize_t, last=cython.Py_ssize_t, middle=cython.Py_ssize_t, entry=tuple
)
cpdef Py_ssize_t before(list log, long long position)
@cython.locals(first=cython.Py_ssize_t)
cpdef reached(list log, long long position)
