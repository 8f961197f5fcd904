"""Runs that several tests look at, each made once per session. A process start costs seconds: one run, many looks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.helpers.layouts import GRADIENTS_EVERY, LAYOUTS, MODEL_ONLY, START, STEPS, Start, world_flags
from tests.helpers.resharding import HALF, train
from tests.helpers.saved_tensors import digests
from tests.helpers.tiny_run import Finished, World, launch, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def start_of(world: World) -> Callable[[str], Start]:
    """The common checkpoint of the layouts of a world of :data:`WORLDS`, made when first asked for."""
    made: dict[str, Start] = {}

    def start(name: str) -> Start:
        if name not in made:
            directory, measured = world.directory / f"start-{name}", world.directory / f"measured-{name}.pt"
            flags = [*world_flags(world, name), "--train-iters", START + STEPS, "--save", directory / "checkpoints"]
            run = launch(
                directory,
                [*flags, "--no-save-optim", "--no-save-rng"],
                module="tests.helpers.randomised_checkpoint",
                arguments_first=[measured, START],
            )
            made[name] = Start(run=run.require_success(), measured=torch.load(measured))
        return made[name]

    return start


@pytest.fixture(scope="session")
def run_of(world: World, start_of: Callable[[str], Start]) -> Callable[[str], Finished]:
    """The ten steps of a layout of :data:`LAYOUTS` from its world's checkpoint, made when first asked for."""
    finished: dict[str, Finished] = {}

    def run(name: str) -> Finished:
        if name not in finished:
            layout = LAYOUTS[name]
            directory = world.directory / "".join(filter(str.isalnum, name))
            flags = [*world_flags(world, layout.world), *MODEL_ONLY, "--train-iters", START + STEPS, *layout.flags]
            flags += ["--load", start_of(layout.world).run.checkpoints, "--save", directory / "checkpoints"]
            flags += ["--save-wgrads-interval", GRADIENTS_EVERY]
            module = "tests.helpers.pretrain_with_margins"
            finished[name] = launch(directory, flags, processes=layout.processes, module=module)
        return finished[name].require_success()

    return run


@pytest.fixture(scope="session")
def half_of(world: World) -> Callable[[str], Finished]:
    """The first three of six steps in a layout of :data:`SIDES`, with a checkpoint at the end."""
    made: dict[str, Finished] = {}

    def half(name: str) -> Finished:
        if name not in made:
            made[name] = train(world, name, world.directory / f"half of {name}", "--exit-interval", HALF)
        return made[name].require_success()

    return half


@pytest.fixture(scope="session")
def rest_of(world: World, half_of: Callable[[str], Finished]) -> Callable[[str], Finished]:
    """The other three steps in the same layout."""
    made: dict[str, Finished] = {}

    def rest(name: str) -> Finished:
        if name not in made:
            made[name] = train(world, name, world.directory / f"rest of {name}", load=half_of(name).checkpoints)
        return made[name].require_success()

    return rest


@pytest.fixture(scope="session")
def bank_before(world: World) -> dict[str, str]:
    """Digests of the bank's files before anything was trained on it."""
    return digests(world.bank)


@pytest.fixture(scope="session")
def fresh(world: World, bank_before: dict[str, str]) -> Finished:
    """Ten uninterrupted steps of one process, with memory, from fresh parameters."""
    return _from_nothing(world, "fresh", world_flags(world, "exclusive"))


@pytest.fixture(scope="session")
def stock(world: World) -> Finished:
    """The same without a bank: Megatron's own model."""
    return _from_nothing(world, "stock", world.flags())


def _from_nothing(world: World, name: str, flags: list[str]) -> Finished:
    directory = world.directory / name
    flags = [*flags, "--train-iters", STEPS, "--save", directory / "checkpoints", "--save-wgrads-interval", 1]
    flags += ["--tensorboard-dir", directory / "tensorboard"]
    return launch(directory, flags).require_success()
