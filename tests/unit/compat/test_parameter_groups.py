"""Learning rates and weight decay of a memory: what Megatron's own optimizer makes of the overrides."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_graft.compat.parameter_groups import ROWS_RATE, SITE_RATE, TABLE_RATE, Multipliers
from tests.helpers.isolated import run_isolated

PARAMETERS = {  # name -> the attribute it is marked by, and its shape
    "table": (TABLE_RATE, (5, 2)), "rows": (ROWS_RATE, (5, 2)), "projection": (SITE_RATE, (2, 2)),
    "site_norm": (SITE_RATE, (2,)), "matrix": (None, (2, 2)), "norm": (None, (2,)),
}  # fmt: skip


def groups_of(multipliers: dict[str, Multipliers], min_lr: float | None) -> dict[str, Any]:
    """Groups that Megatron makes for tables, dense parameters of sites and of the backbone; in a process of its own."""
    import os
    import types

    from megatron_graft.compat import cpu

    cpu.install()
    import torch
    from megatron.core.optimizer import OptimizerConfig, _get_param_groups, get_standard_config_overrides
    from megatron.training import training

    from megatron_graft.compat.parameter_groups import use_multipliers

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=min_lr, weight_decay=0.1)
    given = types.SimpleNamespace(lr=1e-3)

    def stand_in(args: Any) -> Any:  # the real one reads some hundred flags
        assert args is given
        return config, get_standard_config_overrides(config)

    training.get_megatron_optimizer_config = stand_in
    use_multipliers(multipliers)
    config, overrides = training.get_megatron_optimizer_config(given)
    model = torch.nn.Module()
    for name, (attribute, shape) in PARAMETERS.items():
        parameter = torch.nn.Parameter(torch.zeros(shape))
        if attribute is not None:
            setattr(parameter, attribute, True)
        setattr(model, name, parameter)
    groups = _get_param_groups([model], config, overrides)
    found: dict[str, Any] = {"groups": len(groups)}
    for group in groups:
        for name, parameter in model.named_parameters():
            if any(parameter is other for other in group["params"]):
                found[name] = {key: group[key] for key in ("max_lr", "min_lr", "wd_mult", "default_config")}
    return found


def rates(lr_mult: float, min_lr: float | None, wd_mult: float) -> dict[str, Any]:
    """What a group has whose rates are its own. One with the run's learning rate may stand for it in the log."""
    lowest = None if min_lr is None else min_lr * lr_mult
    return {"max_lr": 1e-3 * lr_mult, "min_lr": lowest, "wd_mult": wd_mult, "default_config": lr_mult == 1}


def megatrons(min_lr: float | None, wd_mult: float) -> dict[str, Any]:
    """What it has by default."""
    return {"max_lr": 1e-3, "min_lr": min_lr, "wd_mult": wd_mult, "default_config": True}


@pytest.mark.parametrize(("lr_mult", "wd_mult", "min_lr"), [(5.0, 0.0, 1e-4), (1.0, 0.5, 0.0), (0.0, 0.0, None)])
def test_tables_and_rows_have_rates_and_decays_of_their_own_and_the_rest_keeps_megatrons(
    lr_mult: float, wd_mult: float, min_lr: float | None
) -> None:
    of_table, of_rows = Multipliers(lr=lr_mult, wd=wd_mult), Multipliers(lr=lr_mult + 2, wd=0.25)
    found = run_isolated(groups_of, {TABLE_RATE: of_table, ROWS_RATE: of_rows}, min_lr)
    assert found["table"] == rates(lr_mult, min_lr, wd_mult)
    assert found["rows"] == rates(lr_mult + 2, min_lr, 0.25)
    for name in ("projection", "matrix"):
        assert found[name] == megatrons(min_lr, 1.0)
    for name in ("site_norm", "norm"):
        assert found[name] == megatrons(min_lr, 0.0)
    assert found["groups"] == 4


def test_sites_have_a_rate_of_their_own_and_the_decay_that_megatron_gives_each_parameter() -> None:
    found = run_isolated(groups_of, {SITE_RATE: Multipliers(lr=3.0)}, 1e-4)
    assert found["projection"] == rates(3.0, 1e-4, 1.0)
    assert found["site_norm"] == rates(3.0, 1e-4, 0.0)
    for name in ("table", "rows", "matrix"):
        assert found[name] == megatrons(1e-4, 1.0)
    assert found["norm"] == megatrons(1e-4, 0.0)


@pytest.mark.parametrize("wd_mult", [0.0, 1.0])
def test_who_has_the_rates_of_another_group_is_in_that_one(wd_mult: float) -> None:
    """Two groups of the same rates would be taken for each other when a checkpoint is loaded."""
    found = run_isolated(groups_of, {TABLE_RATE: Multipliers(lr=1.0, wd=wd_mult)}, 1e-4)
    assert found["groups"] == 2
    assert found["table"] == megatrons(1e-4, wd_mult)


def test_without_rates_of_their_own_the_groups_are_megatrons() -> None:
    found = run_isolated(groups_of, {}, 1e-4)
    assert found["groups"] == 2
    assert found["table"] == found["projection"] == megatrons(1e-4, 1.0)
