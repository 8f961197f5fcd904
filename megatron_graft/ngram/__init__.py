"""What an n-gram is: where documents start, and the brute-force answer to every lookup. NumPy only."""
