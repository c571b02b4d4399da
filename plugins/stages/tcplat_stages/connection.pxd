from .exchange cimport Exchange

cdef class End:
    cdef public bint called, named, streams
    cdef public long long closed_ns
    cdef public Connection conn
    cdef public int index
    cdef public object netns, sock, state, process
    cdef public dict stats

cdef class Connection:
    cdef public object accept_us, ask_by, ask_ns, connect_us, error, ip, waiting
    cdef public object reset_by, reset_why
    cdef public object fast_path
    cdef public long long fast_from, fast_pause
    cdef public tuple client, service, doubt, ends, flows, reset_seen
    cdef public long long answered, came, closing_ns, eof_ns, error_ns, first_ns, last_ns, left_ns
    cdef public long long longest_ns, offset_ns, reset_ns
    cdef public long long think_ns, thinks_from_ns, thought_from_ns, thought_ns
    cdef public long long ask_retransmits, ask_zeros, breaks, left_out, number, reported, spans_loss
    cdef public long long syns
    cdef public int missed, went_on
    cdef public bint began, cut, doubtful, guessed, over, replaced, successor, torn, unsure
    cdef public str ended
    cdef public list fin_ns, fins, keys, packet_keys, stamps
    cdef public dict outcomes
    cdef public Exchange replying
    cpdef leave_fast_path(self)
