from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_graft.building.donor import HuggingFaceDonor
from megatron_graft.errors import DonorError
from tests.helpers.building import DONOR_FAMILIES, HIDDEN_SIZE, NUM_LAYERS, save_llama

TEXTS = [" the whale", " the", "the", "w", " the whale was near", "汉字", " a man who", ", and", " the whale"]


def full_model_states(directory: Path, tokens: list[int]) -> list[np.ndarray]:
    """Embedding and every block's output, ``[S, D]`` each, from the whole model in one plain pass in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    last: list[Any] = []
    blocks[-1].register_forward_hook(lambda _module, _arguments, output: last.append(output))
    with torch.no_grad():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    before_norm = last[0][0] if isinstance(last[0], tuple) else last[0]
    return [state[0].numpy() for state in (*states[:-1], before_norm)]


def donor_tokens(directory: Path, text: str, bos: int) -> list[int]:
    from tokenizers import Tokenizer

    return [bos, *Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize("family", sorted(DONOR_FAMILIES))
def test_states_are_those_of_the_whole_model_at_the_last_token(tmp_path: Path, family: str) -> None:
    directory = DONOR_FAMILIES[family](tmp_path / family)
    donor = HuggingFaceDonor(directory, dtype="float32", batch_tokens=12)
    states = donor.encode(TEXTS, [0, 1, 2])
    bos = donor.settings()["donor_bos_id"]
    for row, text in enumerate(TEXTS):
        expected = full_model_states(directory, donor_tokens(directory, text, bos))
        for layer in (0, 1, 2):
            np.testing.assert_allclose(states[layer][row], expected[layer][-1], rtol=1e-4, atol=1e-4)


def test_running_fewer_blocks_changes_no_state(donor_directory: Path) -> None:
    donor = HuggingFaceDonor(donor_directory, dtype="float32")
    all_layers = donor.encode(TEXTS, [0, 1, 2])
    for layers in ([0], [1], [0, 1]):
        for layer, states in donor.encode(TEXTS, layers).items():
            np.testing.assert_array_equal(states, all_layers[layer])


def test_a_text_of_one_donor_token_stands_behind_bos(donor_directory: Path) -> None:
    (word,) = donor_tokens(donor_directory, "w", bos=0)[1:]
    state = HuggingFaceDonor(donor_directory, dtype="float32").encode(["w"], [2])[2][0]
    np.testing.assert_allclose(state, full_model_states(donor_directory, [0, word])[2][1], rtol=1e-4, atol=1e-4)
    assert np.abs(state - full_model_states(donor_directory, [word])[2][0]).max() > 0.1


def test_a_leading_space_makes_another_state(donor_directory: Path) -> None:
    with_space, without = HuggingFaceDonor(donor_directory).encode([" the", "the"], [1])[1]
    assert np.abs(with_space - without).max() > 0.1


def test_a_text_that_spells_a_special_token_is_read_as_text(donor_directory: Path) -> None:
    text = "<|endoftext|>"
    (special,) = donor_tokens(donor_directory, text, bos=0)[1:]
    state = HuggingFaceDonor(donor_directory, dtype="float32").encode([text], [1])[1][0]
    assert np.abs(state - full_model_states(donor_directory, [0, special])[1][1]).max() > 0.1


def test_states_do_not_depend_on_the_number_of_threads(donor_directory: Path) -> None:
    one, three = (
        HuggingFaceDonor(donor_directory, batch_tokens=8, threads=threads).encode(TEXTS * 3, [1, 2])
        for threads in (1, 3)
    )
    for layer in (1, 2):
        np.testing.assert_array_equal(one[layer], three[layer])


def test_torch_has_its_threads_back_afterwards(donor_directory: Path) -> None:
    before = torch.get_num_threads()
    HuggingFaceDonor(donor_directory, threads=2).encode(TEXTS, [1])
    assert torch.get_num_threads() == before


def test_the_revision_follows_the_weights_and_the_name_the_directory(tmp_path: Path, donor_directory: Path) -> None:
    donor = HuggingFaceDonor(donor_directory)
    assert (donor.name, donor.hidden_size, donor.num_layers) == ("tiny-llama", HIDDEN_SIZE, NUM_LAYERS)
    assert HuggingFaceDonor(save_llama(tmp_path / "same")).revision == donor.revision
    assert HuggingFaceDonor(save_llama(tmp_path / "other", seed=6)).revision != donor.revision


@pytest.mark.parametrize("layers", [[], [3], [-1, 1], [2, 1], [1, 1]])
def test_layers_the_donor_does_not_have_are_refused(donor_directory: Path, layers: list[int]) -> None:
    with pytest.raises(DonorError, match="--donor-layers.*1 to 2"):
        HuggingFaceDonor(donor_directory).encode(TEXTS, layers)


def test_a_text_too_long_for_the_donor_is_refused(donor_directory: Path) -> None:
    with pytest.raises(DonorError, match="expected at most 64"):
        HuggingFaceDonor(donor_directory).encode(["x y" * 64], [1])


@pytest.mark.parametrize(
    ("option", "flag"),
    [({"dtype": "int8"}, "--donor-dtype"), ({"batch_tokens": 0}, "--batch-tokens"), ({"threads": 0}, "--threads")],
)
def test_unusable_options_are_refused(donor_directory: Path, option: dict[str, Any], flag: str) -> None:
    with pytest.raises(DonorError, match=flag):
        HuggingFaceDonor(donor_directory, **option)


def copy_without(source: Path, target: Path, pattern: str) -> Path:
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns(pattern)))


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [("*.safetensors", "has no weights"), ("tokenizer*", "has no tokenizer"), ("config.json", "has no config.json")],
)
def test_an_incomplete_directory_is_refused(tmp_path: Path, donor_directory: Path, pattern: str, problem: str) -> None:
    with pytest.raises(DonorError, match=problem):
        HuggingFaceDonor(copy_without(donor_directory, tmp_path / "donor", pattern))


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DonorError, match="is not a directory"):
        HuggingFaceDonor(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("model_type", "architecture"), [("t5", "T5ForConditionalGeneration"), ("bert", "BertForMaskedLM")]
)
def test_a_model_that_is_not_causal_is_refused(
    tmp_path: Path, donor_directory: Path, model_type: str, architecture: str
) -> None:
    directory = copy_without(donor_directory, tmp_path / "donor", "config.json")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    with pytest.raises(DonorError, match="not a causal language model"):
        HuggingFaceDonor(directory)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_garbled_file_is_refused(tmp_path: Path, donor_directory: Path, name: str) -> None:
    directory = copy_without(donor_directory, tmp_path / "donor", name)
    (directory / name).write_text("{")
    with pytest.raises(DonorError, match="transformers cannot"):
        HuggingFaceDonor(directory)


def test_truncated_weights_are_refused(tmp_path: Path, donor_directory: Path) -> None:
    directory = copy_without(donor_directory, tmp_path / "donor", "none")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DonorError, match="weights that transformers cannot load"):
        HuggingFaceDonor(directory).encode(TEXTS, [1])


def test_a_model_with_a_weight_missing_is_refused_and_not_filled_at_random(
    tmp_path: Path, donor_directory: Path
) -> None:
    directory = copy_without(donor_directory, tmp_path / "donor", "none")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DonorError, match="lacks weights.*layers.1.mlp.up_proj"):
        HuggingFaceDonor(directory).encode(TEXTS, [1])
