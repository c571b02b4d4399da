cimport cython

@cython.locals(known=list, kept=list, parts=list, place=cython.int)
cpdef split(stamps, tuple stages=*)
