"""The torch modules that read memory rows and add them to the residual stream."""
