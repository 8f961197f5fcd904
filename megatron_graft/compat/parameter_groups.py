"""Learning rate and weight decay of a memory's parameters, through Megatron's own overrides for groups of parameters.

A parameter of a site has one of the attributes below, by which Megatron finds its group:

* ``TABLE_RATE``: rows of hashed tables;
* ``ROWS_RATE``: rows trained under a bank's keys;
* ``SITE_RATE``: all others, which are dense.

``TABLE_ATTRIBUTE`` marks the rows of both kinds of table.

Megatron's training loop has no hook for overrides of the caller's: the one function that makes them is wrapped. The
rest is Megatron's own. Every rank gets the same groups, in the same order, whether it holds a table or not; the
schedule follows each group's own maximum and minimum; the learning rate in Megatron's log line stays that of the groups
without an override. An initial rate of a warm-up (``--lr-warmup-init``) is shared by all groups.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_graft.compat.rebind import rebind

TABLE_ATTRIBUTE = "memory_table"
TABLE_RATE, ROWS_RATE, SITE_RATE = "engram_rate", "graft_rows_rate", "graft_rate"


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """What a group of parameters has instead of the run's rates.

    Attributes:
        lr: its maximum and minimum learning rate, as a multiple of ``--lr`` and ``--min-lr``.
        wd: its weight decay, as a multiple of ``--weight-decay``; None for what Megatron gives each parameter.
    """

    lr: float
    wd: float | None = None


def use_multipliers(multipliers: Mapping[str, Multipliers]) -> None:
    """Give groups of parameters their own learning rate and weight decay.

    Args:
        multipliers: by the attribute that marks a group's parameters. Only groups that differ from the rest should be
            here: each is a group of its own in the optimizer's checkpoints.

    Raises:
        PlatformError: the installed Megatron makes its overrides in another way.
    """
    if not multipliers:
        return
    from megatron.training import training

    rebind(training, "get_megatron_optimizer_config", ("args",), lambda original: _with(original, multipliers))


def _with(original: Callable[..., Any], multipliers: Mapping[str, Multipliers]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_megatron_optimizer_config(args: argparse.Namespace) -> tuple[Any, dict[Any, Any]]:
        from megatron.core.optimizer import ParamKey

        config, overrides = original(args)
        own = {ParamKey(attr=attribute): _override(config, of_group) for attribute, of_group in multipliers.items()}
        return config, {**(overrides or {}), **{key: override for key, override in own.items() if override}}

    return get_megatron_optimizer_config


def _override(config: Any, multipliers: Multipliers) -> Any:
    """What differs from the run's rates, and no more.

    Megatron finds a group of a checkpoint again by its rates: two groups of the same ones, of which one says so and the
    other does not, would be taken for each other.
    """
    from megatron.core.optimizer import ParamGroupOverride

    override = ParamGroupOverride()
    if multipliers.wd not in (None, 1):
        override["wd_mult"] = multipliers.wd
    for limit, value in (("max_lr", config.lr), ("min_lr", config.min_lr)):
        if value is not None and multipliers.lr != 1:
            override[limit] = value * multipliers.lr
    return override
