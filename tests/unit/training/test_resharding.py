"""What a layout's optimizer state depends on when it is not fully reshardable, by Megatron's own arguments."""

from __future__ import annotations

import argparse

import pytest

from megatron_graft.errors import ConfigError
from megatron_graft.training.resharding import _SIZES, check_optimizer


def arguments(**changes: object) -> argparse.Namespace:
    same = dict.fromkeys(_SIZES) | {"use_distributed_optimizer": True, "load": "run/checkpoints"}
    return argparse.Namespace(**same | changes)


@pytest.mark.parametrize(("name", "flag"), _SIZES.items())
def test_another_split_of_the_layers_is_refused_by_its_flag(name: str, flag: str) -> None:
    check_optimizer(arguments(**{name: 2}), arguments(**{name: 2}))
    with pytest.raises(ConfigError, match=f"^{flag}: differs"):
        check_optimizer(arguments(**{name: 2}), arguments())


def test_a_reshardable_checkpoint_is_not() -> None:
    check_optimizer(arguments(pipeline_model_parallel_layout="Et|L"), arguments(dist_ckpt_optim_fully_reshardable=True))
    plain = {"use_distributed_optimizer": False}
    check_optimizer(arguments(**plain, pipeline_model_parallel_layout="Et|L"), arguments(**plain))


def test_a_checkpoint_from_before_there_was_a_flag_counts_as_without_it() -> None:
    saved = arguments()
    del saved.pipeline_model_parallel_layout
    check_optimizer(arguments(), saved)
