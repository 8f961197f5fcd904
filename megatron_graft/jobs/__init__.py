"""Bodies of commands that join rooms which do not know each other: building, data and reporting.

Flags, the files they name, and the order of things; whatever can be used as a library lies in those rooms.
"""
