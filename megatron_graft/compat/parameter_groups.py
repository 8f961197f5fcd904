"""Learning rate and weight decay of trainable tables, through Megatron's own overrides for groups of parameters.

Megatron's training loop has no hook for overrides of the caller's: the one function that makes them is wrapped. The
rest is Megatron's own. Every rank gets the same groups, in the same order, whether it holds a table or not; the
schedule follows each group's own maximum and minimum; the learning rate in Megatron's log line stays that of the groups
without an override. An initial rate of a warm-up (``--lr-warmup-init``) is shared by all groups.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron_graft.compat.rebind import rebind

TABLE_ATTRIBUTE = "engram_table"


def use_table_overrides(lr_mult: float, wd_mult: float) -> None:
    """Give parameters with the attribute ``engram_table`` their own learning rate and weight decay.

    Args:
        lr_mult: their maximum and minimum learning rate, as a multiple of ``--lr`` and ``--min-lr``.
        wd_mult: their weight decay, as a multiple of ``--weight-decay``.

    Raises:
        PlatformError: the installed Megatron makes its overrides in another way.
    """
    from megatron.training import training

    rebind(training, "get_megatron_optimizer_config", ("args",), lambda original: _with(original, lr_mult, wd_mult))


def _with(original: Callable[..., Any], lr_mult: float, wd_mult: float) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_megatron_optimizer_config(args: argparse.Namespace) -> tuple[Any, dict[Any, Any]]:
        from megatron.core.optimizer import ParamGroupOverride, ParamKey

        config, overrides = original(args)
        of_tables = ParamGroupOverride(wd_mult=wd_mult)
        for limit, value in (("max_lr", config.lr), ("min_lr", config.min_lr)):
            if value is not None:
                of_tables[limit] = value * lr_mult
        return config, {**(overrides or {}), ParamKey(attr=TABLE_ATTRIBUTE): of_tables}

    return get_megatron_optimizer_config
