"""Offline stages that make a bank: count -> select -> encode -> assemble, and the coverage report.

The donor is reached through the small ``Encoder`` protocol; torch and transformers are imported only by the
donor modules, and only when a donor is loaded.
"""
