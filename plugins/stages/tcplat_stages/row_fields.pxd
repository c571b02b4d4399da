cimport cython

cdef class Look:
    cdef public long long[::1] numbers
    cdef public Py_ssize_t width, hook, user, ends, flags
    cdef public long long ts_ns, seq, bytes, sock, ack, window
    @cython.locals(at=cython.Py_ssize_t)
    cpdef turn_to(self, Py_ssize_t index)
    cpdef bint shows_window(self)

cdef class Slim:
    cdef public object event, batch
    cdef public Look look
    cdef public long long[::1] numbers
    cdef public Py_ssize_t _at, _index, _width
    cdef public list _hooks, _users, _ends, _states, _flags
    cdef public long long ts_ns
    cdef public object sock, seq, bytes, netns, saddr, sport, daddr, dport, pid, comm
    cdef public str point, state, flags
    cpdef load(self, event)
    @cython.locals(
        at=cython.Py_ssize_t,
        seq=cython.longlong,
        count=cython.longlong,
        sock=cython.longlong,
        hook=tuple,
        ends=tuple,
        user=tuple,
        states=tuple,
    )
    cpdef turn_to(self, Py_ssize_t index)
    @cython.locals(number=cython.longlong)
    cpdef own(self, str name)
    @cython.locals(window=cython.longlong)
    cpdef bint shows_window(self)

cdef long long UNKNOWN, MISSING
cdef Py_ssize_t TS_NS, SEQ, BYTES, SOCK, ACK, WINDOW, HOOK, USER, ENDS, STATES, FLAGS

cpdef bint shows_window(Slim row)
cpdef bint opens(str flags)
cpdef whole(row, str name)
cpdef bint calls(row)
cpdef bint listens(row)
cpdef shared(text)
