"""How a run opens its memory: which banks and how much of them, which tables, and what every site reads."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import open_bank
from megatron_graft.data.memory_layout import GraftReading
from megatron_graft.data.token_compression import compress_vocabulary
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.errors import ConfigError, IdentityError
from megatron_graft.training.arguments import add_graft_arguments, graft_settings
from megatron_graft.training.identity import memory_identity
from megatron_graft.training.memory_setup import RunMemory, open_run_memory
from megatron_graft.training.settings import GraftSettings
from tests.helpers.banks import fitting_bank, make_bank
from tests.helpers.memories import contents, layout_of
from tests.helpers.tokenizers import small_sentencepiece
from tests.unit.training.test_arguments import MEGATRON_DEFAULTS

COUNTS = {(5, 6): 9, (7, 5, 6): 5, (6, 6): 3, (8, 7, 5, 6): 1}
NUM_LAYERS = 4
TABLES = ["--engram-layers", "3", "2", "--engram-heads", "2", "--engram-vocab-size", "11", "--engram-dim", "6"]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def bank_path(tmp_path: Path, tokenizer_file: Path) -> Path:
    return fitting_bank(tmp_path / "bank", tokenizer_file, COUNTS)


@pytest.fixture
def deep_bank(tmp_path: Path, tokenizer_file: Path) -> Path:
    """Of three donor layers."""
    return fitting_bank(tmp_path / "deep", tokenizer_file, COUNTS, layers=(4, 8, 24), width=5, seed=3)


def open_memory(tokenizer_file: Path, *flags: Any, **megatron: Any) -> RunMemory | None:
    args, settings = run_settings(tokenizer_file, *flags, **megatron)
    return open_run_memory(settings, args)


def run_memory(bank: Path, tokenizer_file: Path, *flags: Any, **megatron: Any) -> RunMemory:
    """Of a run whose layer 2 reads the bank, unless flags that follow say otherwise."""
    memory = open_memory(tokenizer_file, "--graft-bank", bank, "--graft-layers", 2, *flags, **megatron)
    assert memory is not None
    return memory


def run_settings(tokenizer_file: Path, *flags: Any, **megatron: Any) -> tuple[argparse.Namespace, GraftSettings]:
    parser = add_graft_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args([str(flag) for flag in flags])
    run: dict[str, Any] = {
        "num_layers": NUM_LAYERS, "tokenizer_model": str(tokenizer_file), "seq_length": 16, "seed": 1,
        "init_method_std": 0.02, "data_path": None, "train_data_path": None, "valid_data_path": None,
        "test_data_path": None, "data_args_path": None, "per_split_data_args_path": None,
    }  # fmt: skip
    for name, value in (MEGATRON_DEFAULTS | run | megatron).items():
        setattr(args, name, value)
    return args, graft_settings(args)


def rows_found(memory: RunMemory, bank: int = 0) -> list[int]:
    rows_BS, _ = memory.indexes[bank].lookup(np.array([[8, 7, 5, 6, 6]]), eod=memory.tokenizer.eod)
    return rows_BS[0].tolist()


def graft_of(memory: RunMemory, layer: int) -> GraftReading:
    graft = memory.sites[layer].reading.graft
    assert graft is not None
    return graft


def test_by_default_the_whole_bank_is_read_where_it_lies(bank_path: Path, tokenizer_file: Path) -> None:
    memory = run_memory(bank_path, tokenizer_file)
    (bank,) = memory.banks
    assert (bank.path, bank.num_rows) == (bank_path, 4)
    assert graft_of(memory, 2).width == bank.row_dim == 4
    assert memory.engram is None
    assert rows_found(memory) == [-1, -1, -1, 3, 2]


def test_without_flags_there_is_no_memory_and_no_tokenizer_is_read(tmp_path: Path) -> None:
    assert open_memory(tmp_path / "no tokenizer") is None


def test_with_fewer_rows_the_run_has_another_identity_and_other_matches(bank_path: Path, tokenizer_file: Path) -> None:
    whole, part = run_memory(bank_path, tokenizer_file), run_memory(bank_path, tokenizer_file, "--bank-rows", "2")
    assert part.banks[0].num_rows == 2
    assert rows_found(part) == [-1, -1, -1, 1, -1]
    identity = memory_identity(whole)
    assert identity is not None
    assert memory_identity(part) == identity | {"banks": [open_bank(bank_path, rows=2).digest]}
    assert memory_identity(part) != identity
    assert memory_identity(run_memory(bank_path, tokenizer_file, "--bank-rows", "4")) == identity


def test_a_copy_on_the_node_is_the_same_bank_read_elsewhere(
    bank_path: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    whole = run_memory(bank_path, tokenizer_file)
    flags = ["--bank-node-copy", tmp_path / "node", "--graft-verify-bank", "full"]
    copied = run_memory(bank_path, tokenizer_file, *flags)
    assert copied.banks[0].path == tmp_path / "node" / whole.banks[0].digest
    assert memory_identity(copied) == memory_identity(whole)
    assert rows_found(copied) == rows_found(whole)
    (part,) = run_memory(bank_path, tokenizer_file, *flags, "--bank-rows", "2").banks
    assert (part.path, part.num_rows) == (copied.banks[0].path, 2)


@pytest.mark.parametrize(
    "flags", [["--bank-huge-pages"], ["--bank-lookup-threads", "3"], ["--graft-lookup", "reference"]]
)
def test_how_memory_is_read_changes_no_answer_and_no_identity(
    bank_path: Path, tokenizer_file: Path, flags: list[str]
) -> None:
    whole, other = (run_memory(bank_path, tokenizer_file, *TABLES, *more) for more in ([], flags))
    assert rows_found(other) == rows_found(whole)
    assert memory_identity(other) == memory_identity(whole)
    tokens = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    first, second = (memory.fetcher(layout_of(memory)).fetch(tokens, 0).memory for memory in (whole, other))
    assert contents(first) == contents(second)


def test_the_reference_fetcher_finds_the_same_by_other_means(bank_path: Path, tokenizer_file: Path) -> None:
    memory = run_memory(bank_path, tokenizer_file, *TABLES, "--bank-rows", 3)
    reference = memory.reference_fetcher(layout_of(memory))
    ((bank, index),), hashers = reference.sources.banks, reference.sources.hashers
    kinds = {type(part).__name__ for part in (index, *hashers.values())}
    assert (bank.gather_implementation, reference.sources.implementation) == ("reference", "reference")
    assert (bank.num_rows, kinds) == (3, {"ReferenceIndex", "ReferenceHasher"})
    tokens = torch.tensor([[8, 7, 5, 6, 6, 2, 5, 6]])
    fetched = memory.fetcher(layout_of(memory)).fetch(tokens, 0).memory
    assert contents(reference.fetch(tokens, 0).memory) == contents(fetched)


def test_more_rows_than_the_bank_has_are_refused_by_flag(bank_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^--bank-rows: is more than the bank {bank_path} has \(got 5; .* at most 4"
    ):
        run_memory(bank_path, tokenizer_file, "--bank-rows", "5")


def test_a_bank_that_does_not_fit_the_run_is_not_copied(
    bank_path: Path, deep_bank: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    copy = ["--bank-node-copy", tmp_path / "node"]
    with pytest.raises(ConfigError, match="^--seq-length: is shorter"):
        run_memory(bank_path, tokenizer_file, *copy, seq_length=3)
    with pytest.raises(ConfigError, match="^--graft-donor-layers: names layers"):
        run_memory(deep_bank, tokenizer_file, *copy, "--graft-donor-layers", 5)
    with pytest.raises(ConfigError, match="^--engram-dim: "):
        run_memory(bank_path, tokenizer_file, *copy, *TABLES, "--engram-dim", 5)
    foreign = make_bank(tmp_path / "foreign", {(1, 2): 3}).path
    with pytest.raises(IdentityError, match="is not the tokenizer of the bank"):
        run_memory(foreign, tokenizer_file, *copy)
    with pytest.raises(IdentityError, match=f"is not the tokenizer of the bank {foreign}"):
        run_memory(bank_path, tokenizer_file, "--graft-bank", bank_path, foreign, "--graft-layers", 1, 2, *copy)
    assert not (tmp_path / "node").exists()


def test_each_site_reads_the_bank_and_the_donor_layers_named_in_its_place(
    bank_path: Path, deep_bank: Path, tokenizer_file: Path
) -> None:
    flags = ["--graft-bank", deep_bank, bank_path, deep_bank, "--graft-layers", 4, 1, 2]
    memory = run_memory(bank_path, tokenizer_file, *flags, "--graft-donor-layers", "8,24", "12", "4")
    assert [bank.path for bank in memory.banks] == [deep_bank, bank_path, deep_bank]
    assert memory.layers == (1, 2, 4)
    read = {layer: (graft_of(memory, layer).bank, graft_of(memory, layer).columns) for layer in memory.layers}
    assert read == {4: (0, (5, 15)), 1: (1, (0, 4)), 2: (2, (0, 5))}
    assert graft_of(memory, 4).row_layout == memory.banks[0].row_layout


@pytest.mark.parametrize(("donor_layers", "columns"), [("4,8,24", (0, 15)), ("8", (5, 10)), ("8,24", (5, 15))])
def test_adjacent_donor_layers_are_columns_of_the_bank(
    deep_bank: Path, tokenizer_file: Path, donor_layers: str, columns: tuple[int, int]
) -> None:
    memory = run_memory(deep_bank, tokenizer_file, "--graft-donor-layers", donor_layers)
    assert graft_of(memory, 2).columns == columns


@pytest.mark.parametrize("donor_layers", ["4,24", "24,8", "8,8", "5", "4,8,24,25"])
def test_donor_layers_that_do_not_stand_side_by_side_are_refused(
    deep_bank: Path, tokenizer_file: Path, donor_layers: str
) -> None:
    message = rf"^--graft-donor-layers: names layers .* bank {deep_bank} \(got {donor_layers}; expected .* of 4,8,24,"
    with pytest.raises(ConfigError, match=message):
        run_memory(deep_bank, tokenizer_file, "--graft-donor-layers", donor_layers)


@pytest.mark.parametrize(("flags", "rows"), [([], 4), (["--bank-rows", 3], 3)])
def test_each_site_trains_a_row_for_every_key_of_its_bank(
    bank_path: Path, tokenizer_file: Path, flags: list[Any], rows: int
) -> None:
    for start in ("trained", "fresh"):
        memory = run_memory(bank_path, tokenizer_file, *flags, "--graft-layers", 1, 3, "--graft-rows", start)
        assert [graft_of(memory, layer).trained_rows for layer in memory.layers] == [rows, rows]
        assert {site.rows for site in memory.sites.values()} == {start}
        assert layout_of(memory).exchanged_rows == (rows,)
    frozen = run_memory(bank_path, tokenizer_file, *flags)
    assert (graft_of(frozen, 2).trained_rows, frozen.sites[2].rows) == (None, "frozen")


def test_trained_rows_start_as_the_columns_that_the_site_reads_of_the_bank_that_is_used(
    bank_path: Path, deep_bank: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    flags = ["--graft-bank", deep_bank, bank_path, "--graft-layers", 4, 1, "--graft-donor-layers", "8,24", "12"]
    flags += ["--bank-rows", 3, "--bank-node-copy", tmp_path / "node", "--graft-rows", "trained"]
    memory = run_memory(bank_path, tokenizer_file, *flags)
    for layer, path, columns in ((4, deep_bank, (5, 15)), (1, bank_path, (0, 4))):
        values = memory.sites[layer].row_values
        assert values is not None
        expected = open_bank(path).float_rows(np.arange(3), columns)
        assert np.array_equal(values(0, 3).numpy(), expected, equal_nan=True)  # rows of any bits
    assert all(bank.path.parent == tmp_path / "node" for bank in memory.banks)
    fresh = run_memory(bank_path, tokenizer_file, *flags[:-1], "fresh")
    assert [site.row_values for site in fresh.sites.values()] == [None, None]


def test_tables_are_made_from_the_tokenizer_and_the_flags(tokenizer_file: Path) -> None:
    memory = open_memory(tokenizer_file, *TABLES, "--engram-layer-ids", 9, 5, "--engram-seed", 3)
    assert memory is not None and memory.engram is not None
    tokenizer = load_tokenizer(tokenizer_file)
    config, vocabulary = memory.engram.config, compress_vocabulary(tokenizer)
    assert (memory.banks, memory.layers) == ((), (2, 3))
    assert config.layer_ids == ((2, 5), (3, 9))
    assert (config.vocab_sizes, config.heads, config.seed, config.pad_id) == ((11, 11), 2, 3, tokenizer.eod)
    assert memory.engram.vocabulary.digest == vocabulary.digest
    for layer, site in memory.sites.items():
        reading = site.reading.engram
        assert reading is not None and site.reading.graft is None
        assert reading.num_rows == memory.engram.hashes[layer].num_rows
        assert (reading.num_heads, reading.head_dim, reading.max_order) == (4, 3, 3)


@pytest.mark.parametrize("pad_id", [-1, 400_000])
def test_a_pad_id_that_the_tokenizer_does_not_have_is_refused(tokenizer_file: Path, pad_id: int) -> None:
    with pytest.raises(ConfigError, match=rf"^--engram-pad-id: .*got {pad_id}"):
        open_memory(tokenizer_file, *TABLES, "--engram-pad-id", pad_id)


def test_layers_may_read_a_bank_a_table_or_both(bank_path: Path, tokenizer_file: Path) -> None:
    memory = run_memory(bank_path, tokenizer_file, *TABLES, "--graft-layers", 1, 2)
    readings = {layer: memory.sites[layer].reading for layer in memory.layers}
    kinds = {layer: (reading.graft is not None, reading.engram is not None) for layer, reading in readings.items()}
    assert kinds == {1: (True, False), 2: (True, True), 3: (False, True)}
    assert not readings[2].exclusive
    assert run_memory(bank_path, tokenizer_file, *TABLES, "--graft-combine", "exclusive").sites[2].reading.exclusive


def test_the_convolutions_dilation_is_the_longest_ngram_of_its_site_unless_given(
    bank_path: Path, tokenizer_file: Path
) -> None:
    flags = [*TABLES, "--graft-layers", 1, 2]
    memory = run_memory(bank_path, tokenizer_file, *flags)
    assert {layer: site.conv_dilation for layer, site in memory.sites.items()} == {1: 4, 2: 4, 3: 3}
    given = run_memory(bank_path, tokenizer_file, *flags, "--graft-conv-dilation", 2, "--graft-gate", "signed-sqrt")
    assert {(site.conv_dilation, site.gate) for site in given.sites.values()} == {(2, "signed-sqrt")}


@pytest.mark.parametrize(("order", "seq_length"), [(6, 5), (3, 2)])
def test_a_sequence_shorter_than_a_hashed_ngram_is_refused(tokenizer_file: Path, order: int, seq_length: int) -> None:
    flags = [*TABLES, "--engram-max-order", order]
    with pytest.raises(ConfigError, match=rf"^--seq-length: .*got {seq_length}; expected at least {order}"):
        open_memory(tokenizer_file, *flags, seq_length=seq_length)
    assert open_memory(tokenizer_file, *flags, seq_length=order) is not None


@pytest.mark.parametrize(
    ("size", "sequence_parallel", "flags", "message"),
    [
        (5, False, [], r"of the 4 columns that layer 2 reads of its bank \(got 5; expected at most 4\)"),
        (5, False, TABLES, r"of the 4 heads of layer 2's table \(got 5; expected at most 4\)"),
        (61, True, TABLES, r"of the 60 rows of layer 2's table \(got 61; expected at most 60\)"),
        (5, True, ["--graft-rows", "fresh"], r"of the 4 trained rows of layer 2 \(got 5; expected at most 4\)"),
    ],
)
def test_more_tensor_parallel_ranks_than_there_is_to_share_are_refused(
    bank_path: Path, tokenizer_file: Path, size: int, sequence_parallel: bool, flags: list[Any], message: str
) -> None:
    flags = flags if flags == TABLES else ["--graft-bank", bank_path, "--graft-layers", 2, *flags]
    layout = {"sequence_parallel": sequence_parallel, "seq_length": 64}
    with pytest.raises(ConfigError, match=f"^--tensor-model-parallel-size: leaves a rank none {message}"):
        open_memory(tokenizer_file, *flags, tensor_model_parallel_size=size, **layout)
    assert open_memory(tokenizer_file, *flags, tensor_model_parallel_size=size - 1, **layout) is not None


def test_under_sequence_parallelism_columns_and_heads_are_not_shared(bank_path: Path, tokenizer_file: Path) -> None:
    memory = run_memory(bank_path, tokenizer_file, *TABLES, tensor_model_parallel_size=16, sequence_parallel=True)
    assert memory.layers == (2, 3)


def test_whatever_changes_answers_changes_the_identity(bank_path: Path, deep_bank: Path, tokenizer_file: Path) -> None:
    """And is found in the part of it that the refusal of a checkpoint names."""
    base = [*TABLES, "--graft-bank", bank_path, "--graft-layers", 2]
    changes: dict[str, list[list[Any]]] = {
        "banks": [["--graft-bank", deep_bank], ["--bank-rows", 3]],
        "engram": [
            ["--engram-max-order", 2], ["--engram-heads", 3], ["--engram-vocab-size", 13], ["--engram-dim", 8],
            ["--engram-seed", 1], ["--engram-pad-id", 7], ["--engram-across-documents"],
            ["--engram-layer-ids", 4, 5],
        ],
        "sites": [
            ["--graft-combine", "exclusive"], ["--graft-gate", "signed-sqrt"], ["--graft-conv-kernel", 3],
            ["--graft-conv-dilation", 2], ["--graft-rows", "trained"], ["--graft-rows", "fresh"],
            ["--graft-layers", 1], ["--graft-bank", deep_bank, "--graft-donor-layers", 8],
        ],
    }  # fmt: skip
    plain = memory_identity(run_memory(bank_path, tokenizer_file, *base))
    assert plain is not None and set(plain) == {"tokenizer", "banks", "engram", "sites"}
    seen = [plain]
    for name, of_name in changes.items():
        for flags in of_name:
            identity = memory_identity(run_memory(bank_path, tokenizer_file, *base, *flags))
            assert identity is not None and identity[name] != plain[name], flags
            assert identity not in seen, flags
            seen.append(identity)


def test_a_checkpoints_identity_is_plain_values_of_this_shape(bank_path: Path, tokenizer_file: Path) -> None:
    memory = run_memory(bank_path, tokenizer_file, *TABLES)
    identity = memory_identity(memory)
    assert identity is not None and memory.engram is not None
    assert identity["tokenizer"] == load_tokenizer(tokenizer_file).fingerprint
    assert identity["banks"] == [open_bank(bank_path).digest]
    assert identity["engram"]["layer_ids"] == [[2, 1], [3, 2]]
    rows = {layer: hash_.num_rows for layer, hash_ in memory.engram.hashes.items()}
    both = {"bank": 0, "columns": [0, 4], "engram_rows": rows[2], "combine": "sum", "gate": "plain"}
    alone = {"bank": None, "columns": None, "engram_rows": rows[3], "combine": None, "gate": "plain"}
    convolution = {"conv_kernel": 4, "conv_dilation": 4}
    assert identity["sites"] == {"2": both | convolution, "3": alone | convolution | {"conv_dilation": 3}}
    assert memory_identity(None) is None
    assert memory_identity(dataclasses.replace(memory, threads=3)) == identity


def test_rows_that_are_trained_are_named_in_the_identity_of_the_sites_that_have_them(
    bank_path: Path, tokenizer_file: Path
) -> None:
    """And of no other, so that checkpoints of frozen rows from before the choice can be continued."""
    for rows in ("trained", "fresh"):
        identity = memory_identity(run_memory(bank_path, tokenizer_file, *TABLES, "--graft-rows", rows))
        assert identity is not None
        assert identity["sites"]["2"]["rows"] == rows
        assert "rows" not in identity["sites"]["3"]


def test_how_fast_rows_and_sites_learn_is_no_part_of_the_identity(bank_path: Path, tokenizer_file: Path) -> None:
    base = ["--graft-rows", "trained"]
    plain = memory_identity(run_memory(bank_path, tokenizer_file, *base))
    rates = ["--graft-rows-lr-mult", 5, "--graft-rows-wd-mult", 1, "--graft-lr-mult", 2]
    assert memory_identity(run_memory(bank_path, tokenizer_file, *base, *rates)) == plain
