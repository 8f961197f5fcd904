"""One model, one global batch, any layout: the same losses and the same gradients.

All layouts load one model-only checkpoint whose sites matter (every parameter random) and train ten steps in fp32 with
no dropout. What is left between them is the order in which numbers are added.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers.layouts import GRADIENTS_EVERY, LAYOUTS, START, STEPS, Start
from tests.helpers.saved_tensors import largest_difference, read_checkpoint, read_gradients
from tests.helpers.tiny_run import NUM_LAYERS, SITE_LAYERS, Finished

Runs = Callable[[str], Finished]
FIRST_LOSS, LOSSES = 1e-6, 1e-5  # relative; seen here: 0 and 8e-8
GRADIENTS = 1e-5  # of the tensor's largest value; seen here: 9e-7
PARAMETERS = 1e-4  # of the tensor's norm, after ten steps of Adam; seen here: 4e-6
OTHERS = [name for name in LAYOUTS if name != "single"]
SITE_PARAMETERS = {"key_weight", "value_weight", "key_norm", "query_norm", "conv_norm", "conv_kernel"}


def smallest_margins(run: Finished) -> str:
    """Per iteration, how close the router's nearest call was: what to look at first when losses part."""
    margins = [float(line) for line in (run.directory / "margins.txt").read_text().split()]
    calls = len(margins) // STEPS
    smallest = {START + 1 + step: min(margins[step * calls : (step + 1) * calls]) for step in range(STEPS)}
    return "smallest distance between the router's 2nd and 3rd logit, by iteration: " + ", ".join(
        f"{iteration}: {margin:.1e}" for iteration, margin in smallest.items()
    )


def test_the_memory_moves_the_loss(start: Start) -> None:
    assert abs(start.measured["loss"] - start.measured["bypassed"]) > 1e-2


def test_the_sites_compute_their_definition(start: Start) -> None:
    """Against an oracle that finds n-grams by trying every key and cuts documents apart before it computes."""
    measured = start.measured
    assert measured["loss"] == pytest.approx(measured["oracle_loss"], rel=1e-6)
    for name, expected in measured["oracle_gradients"].items():
        assert largest_difference(measured["gradients"][name], expected) <= GRADIENTS, name


def test_a_token_changes_nothing_before_it(start: Start) -> None:
    reach = start.measured["causality"]
    assert reach["before"] <= 1e-5
    assert reach["after"] > 1e-1


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_loss_is_what_one_process_measured(name: str, start: Start, run_of: Runs) -> None:
    assert run_of(name).losses[START + 1] == pytest.approx(start.measured["loss"], rel=FIRST_LOSS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_gradient_of_the_first_step_equals_the_single_process(name: str, start: Start, run_of: Runs) -> None:
    copies_of = read_gradients(run_of(name).checkpoints, GRADIENTS_EVERY, LAYOUTS[name].axis)
    expected_of = start.measured["gradients"]
    assert copies_of.keys() == expected_of.keys()
    assert sum(".memory." in key for key in copies_of) == len(SITE_LAYERS) * len(SITE_PARAMETERS)
    wrong = {
        f"{key}, copy {index}": difference
        for key, copies in copies_of.items()
        for index, copy in enumerate(copies)
        if not (difference := largest_difference(copy, expected_of[key])) <= GRADIENTS
    }
    assert not wrong
    assert all(float(expected.abs().max()) > 0 for expected in expected_of.values())


@pytest.mark.parametrize("name", OTHERS)
def test_ten_losses_equal_the_single_process(name: str, run_of: Runs) -> None:
    expected, actual = run_of("single"), run_of(name)
    assert list(expected.losses) == list(actual.losses) == list(range(START + 1, START + STEPS + 1))
    assert actual.losses == pytest.approx(expected.losses, rel=LOSSES), smallest_margins(expected)


@pytest.mark.parametrize("name", OTHERS)
def test_the_saved_model_equals_the_single_process(name: str, run_of: Runs) -> None:
    expected_of = read_checkpoint(run_of("single").checkpoints, START + STEPS)
    saved = read_checkpoint(run_of(name).checkpoints, START + STEPS)
    model = [key for key in expected_of if key.startswith(("embedding.", "decoder.", "output_layer."))]
    assert {key.split(".")[2] for key in model if ".memory_" in key} == {f"memory_{layer}" for layer in SITE_LAYERS}
    for key in model:
        assert (saved[key] - expected_of[key]).norm() <= PARAMETERS * expected_of[key].norm(), key


def test_no_choice_of_the_router_was_a_tie(run_of: Runs) -> None:
    """A tie would let rounding choose the expert, and the layouts part for no fault of theirs."""
    single = run_of("single")
    margins = [float(line) for line in (single.directory / "margins.txt").read_text().split()]
    assert len(margins) == STEPS * NUM_LAYERS * 4  # micro-batches
    assert min(margins) > 1e-6, smallest_margins(single)
