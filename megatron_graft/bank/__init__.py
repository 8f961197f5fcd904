"""The bank: a directory of frozen rows, the n-grams that address them and a manifest that says what they are.

No torch here: a bank can be opened, verified and inspected on a machine that has NumPy only.
"""
