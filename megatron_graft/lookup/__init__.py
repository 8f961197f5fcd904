"""Token ids to rows: which bank row the longest known n-gram at each position has.

Two implementations of one interface, ``native`` (C++) and ``reference`` (NumPy); both must agree with
``megatron_graft.ngram.oracle`` on every input. No torch here.
"""
