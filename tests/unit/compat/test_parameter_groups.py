"""Learning rate and weight decay of tables: what Megatron's own optimizer makes of the overrides."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.isolated import run_isolated


def groups_of(lr_mult: float, wd_mult: float, min_lr: float | None) -> dict[str, Any]:
    """Groups that Megatron makes for a table, a matrix and a norm; in a process of its own."""
    import os
    import types

    from megatron_graft.compat import cpu

    cpu.install()
    import torch
    from megatron.core.optimizer import OptimizerConfig, _get_param_groups, get_standard_config_overrides
    from megatron.training import training

    from megatron_graft.compat.parameter_groups import TABLE_ATTRIBUTE, use_table_overrides

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config = OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=min_lr, weight_decay=0.1)
    given = types.SimpleNamespace(lr=1e-3)

    def stand_in(args: Any) -> Any:  # the real one reads some hundred flags
        assert args is given
        return config, get_standard_config_overrides(config)

    training.get_megatron_optimizer_config = stand_in
    use_table_overrides(lr_mult, wd_mult)
    config, overrides = training.get_megatron_optimizer_config(given)
    model = torch.nn.Module()
    model.table = torch.nn.Parameter(torch.zeros(5, 2))
    setattr(model.table, TABLE_ATTRIBUTE, True)
    model.matrix, model.norm = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    found = {}
    for group in _get_param_groups([model], config, overrides):
        for name, parameter in model.named_parameters():
            if any(parameter is other for other in group["params"]):
                found[name] = {key: group[key] for key in ("max_lr", "min_lr", "wd_mult", "default_config")}
    return found


@pytest.mark.parametrize(("lr_mult", "wd_mult", "min_lr"), [(5.0, 0.0, 1e-4), (1.0, 0.5, 0.0), (0.0, 0.0, None)])
def test_tables_have_a_rate_and_a_decay_of_their_own_and_the_rest_keeps_megatrons(
    lr_mult: float, wd_mult: float, min_lr: float | None
) -> None:
    found = run_isolated(groups_of, lr_mult, wd_mult, min_lr)
    own = {"max_lr": 1e-3, "min_lr": min_lr, "default_config": True}
    assert found["matrix"] == own | {"wd_mult": 1.0}
    assert found["norm"] == own | {"wd_mult": 0.0}
    lowest = None if min_lr is None else min_lr * lr_mult
    assert found["table"] == {
        "max_lr": 1e-3 * lr_mult, "min_lr": lowest, "wd_mult": wd_mult, "default_config": False,
    }  # fmt: skip
