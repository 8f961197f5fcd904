from types import ModuleType

import pytest

from megatron_graft.compat.rebind import rebind
from megatron_graft.errors import PlatformError


def log(iteration: int, loss: float) -> str:
    return f"{iteration} {loss}"


@pytest.fixture
def module() -> ModuleType:
    module = ModuleType("upstream")
    module.log = log  # type: ignore[attr-defined]
    return module


def test_the_replacement_wraps_the_original(module: ModuleType) -> None:
    rebind(module, "log", ("iteration",), lambda original: lambda *args: original(*args) + "!")
    assert module.log(3, 0.5) == "3 0.5!"


@pytest.mark.parametrize(("name", "parameters"), [("log", ("loss", "iteration")), ("gone", ("iteration",))])
def test_an_upstream_that_changed_is_refused_and_left_alone(
    module: ModuleType, name: str, parameters: tuple[str, ...]
) -> None:
    with pytest.raises(PlatformError, match=rf"upstream\.{name}.*relies on"):
        rebind(module, name, parameters, lambda original: None)
    assert module.log is log


def test_the_installed_megatron_has_the_parameters_we_rely_on() -> None:
    """The three methods and the one function that are rebound, checked without rebinding them."""
    import inspect

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for name, parameters in {
        "sharded_state_dict": ["self", "model_sharded_state_dict", "is_loading"],
        "_set_main_param_and_optimizer_states": ["self", "model_param", "tensors"],
        "load_state_dict": ["self", "state_dict"],
    }.items():
        found = list(inspect.signature(getattr(DistributedOptimizer, name)).parameters)
        assert found[: len(parameters)] == parameters
