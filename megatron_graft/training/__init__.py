"""Glue over ``megatron.training``: arguments, data sets, forward step, metrics, checkpoint identity, evaluation."""
