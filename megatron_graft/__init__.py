"""Conditional memory for Megatron-Core: frozen n-gram banks grafted from a pretrained model."""

__version__ = "0.1.0"
