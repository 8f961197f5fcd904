"""What an n-gram is: suffix windows inside a document, and the brute-force answer to every lookup. NumPy only."""
