"""One model, one global batch, any layout: the same losses and the same gradients.

All layouts of a world load one model-only checkpoint whose sites matter (every parameter random) and train ten steps in
fp32 (but for those of bf16) with no dropout. What is left between them is the order in which numbers are added.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers.layouts import GRADIENTS_EVERY, LAYOUTS, START, STEPS, WORLDS, Start
from tests.helpers.saved_tensors import largest_difference, read_checkpoint, read_gradients
from tests.helpers.tiny_run import NUM_LAYERS, Finished

Runs = Callable[[str], Finished]
Starts = Callable[[str], Start]
FIRST_LOSS, LOSSES = 1e-6, 1e-5  # relative; seen here: 2e-8 and 9e-8
GRADIENTS = 1e-5  # of the tensor's largest value; seen here: 1e-6
PARAMETERS = 1e-4  # of the tensor's norm, after ten steps of Adam; seen here: 4e-6
CLOSE = 3e-3  # the same of bf16 against fp32; relative losses only
OTHERS = [name for name, layout in LAYOUTS.items() if layout.reference != name]
EXACT = [name for name in OTHERS if not LAYOUTS[name].close]
SITES = (2, 3, 4)
GRAFT = {"graft.key_weight", "graft.value_weight"}
ENGRAM = {"engram.key_weight", "engram.value_weight", "engram.table"}
NORMS = {"key_norm", "query_norm", "conv_norm", "conv_kernel"}
SITE_PARAMETERS = {2: NORMS | GRAFT | ENGRAM, 3: NORMS | GRAFT, 4: NORMS | ENGRAM}


def smallest_margins(run: Finished) -> str:
    """Per iteration, how close the router's nearest call was: what to look at first when losses part."""
    path = run.directory / "margins.txt"
    if not path.exists():
        return "a dense model"
    margins = [float(line) for line in path.read_text().split()]
    calls = len(margins) // STEPS
    smallest = {START + 1 + step: min(margins[step * calls : (step + 1) * calls]) for step in range(STEPS)}
    return "smallest distance between the router's 2nd and 3rd logit, by iteration: " + ", ".join(
        f"{iteration}: {margin:.1e}" for iteration, margin in smallest.items()
    )


@pytest.mark.parametrize("name", WORLDS)
def test_the_memory_moves_the_loss(name: str, start_of: Starts) -> None:
    measured = start_of(name).measured
    assert abs(measured["loss"] - measured["bypassed"]) > 1e-2


@pytest.mark.parametrize("name", WORLDS)
def test_the_sites_compute_their_definition(name: str, start_of: Starts) -> None:
    """Against an oracle that finds n-grams by trying every key and cuts documents apart before it computes."""
    measured = start_of(name).measured
    assert measured["loss"] == pytest.approx(measured["oracle_loss"], rel=1e-6)
    for name, expected in measured["oracle_gradients"].items():
        assert largest_difference(measured["gradients"][name], expected) <= GRADIENTS, name


@pytest.mark.parametrize("name", WORLDS)
def test_a_token_changes_nothing_before_it(name: str, start_of: Starts) -> None:
    reach = start_of(name).measured["causality"]
    assert reach["before"] <= 1e-5
    assert reach["after"] > 1e-1
    assert reach["elsewhere"] <= 1e-5 if name == "packed" else reach["elsewhere"] > 1e-3


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not LAYOUTS[LAYOUTS[name].reference].close])
def test_first_loss_is_what_one_process_measured(name: str, start_of: Starts, run_of: Runs) -> None:
    tolerance = CLOSE if LAYOUTS[name].close else FIRST_LOSS
    measured = start_of(LAYOUTS[name].world).measured
    assert run_of(name).losses[START + 1] == pytest.approx(measured["loss"], rel=tolerance)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "--bf16" not in LAYOUTS[name].flags])
def test_every_gradient_of_the_first_step_equals_one_process(name: str, start_of: Starts, run_of: Runs) -> None:
    copies_of = read_gradients(run_of(name).checkpoints, GRADIENTS_EVERY, LAYOUTS[name].split)
    expected_of = start_of(LAYOUTS[name].world).measured["gradients"]
    assert copies_of.keys() == expected_of.keys()
    for layer in SITES:
        prefix = f"decoder.layers.{layer - 1}.memory."
        found = {key.removeprefix(prefix) for key in copies_of if key.startswith(prefix)}
        assert found == SITE_PARAMETERS[layer]
    wrong = {
        f"{key}, copy {index}": difference
        for key, copies in copies_of.items()
        for index, copy in enumerate(copies)
        if not (difference := largest_difference(copy, expected_of[key])) <= GRADIENTS
    }
    assert not wrong
    assert all(float(expected.abs().max()) > 0 for expected in expected_of.values())


def test_bf16_gradients_do_not_depend_on_the_layout(run_of: Runs) -> None:
    name = "bf16, DP=2, distributed optimizer"
    expected_of = read_gradients(run_of("bf16").checkpoints, GRADIENTS_EVERY)
    for key, copies in read_gradients(run_of(name).checkpoints, GRADIENTS_EVERY, LAYOUTS[name].split).items():
        assert largest_difference(copies[0], expected_of[key][0]) <= GRADIENTS, key


@pytest.mark.parametrize("name", OTHERS)
def test_ten_losses_equal_those_of_the_reference(name: str, run_of: Runs) -> None:
    layout = LAYOUTS[name]
    expected, actual = run_of(layout.reference), run_of(name)
    assert list(expected.losses) == list(actual.losses) == list(range(START + 1, START + STEPS + 1))
    tolerance = CLOSE if layout.close else LOSSES
    assert actual.losses == pytest.approx(expected.losses, rel=tolerance), smallest_margins(expected)


@pytest.mark.parametrize("name", EXACT)
def test_gradient_norms_equal_those_of_the_reference(name: str, run_of: Runs) -> None:
    """The norm over all ranks: a table that counted twice, or not at all, would show."""
    norms = [[record["grad_norm"] for record in run_of(run).records] for run in (name, LAYOUTS[name].reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_the_saved_model_equals_the_reference(name: str, run_of: Runs) -> None:
    expected_of = read_checkpoint(run_of(LAYOUTS[name].reference).checkpoints, START + STEPS)
    saved = read_checkpoint(run_of(name).checkpoints, START + STEPS)
    model = [key for key in expected_of if key.startswith(("embedding.", "decoder.", "output_layer."))]
    assert {key.split(".")[2] for key in model if ".memory_" in key} == {f"memory_{layer}" for layer in SITES}
    for key in model:
        assert (saved[key] - expected_of[key]).norm() <= PARAMETERS * expected_of[key].norm(), key


@pytest.mark.parametrize("name", ["single", "sum"])
def test_no_choice_of_the_router_was_a_tie(name: str, run_of: Runs) -> None:
    """A tie would let rounding choose the expert, and the layouts part for no fault of theirs."""
    single = run_of(name)
    margins = [float(line) for line in (single.directory / "margins.txt").read_text().split()]
    assert len(margins) == STEPS * NUM_LAYERS * 4  # micro-batches
    assert min(margins) > 1e-6, smallest_margins(single)
