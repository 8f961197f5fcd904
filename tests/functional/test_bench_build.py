"""The building bench at a small size: that it runs, and that what it compares agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_graft.data.sidecar import write_sidecar
from megatron_graft.data.tokenizer import load_tokenizer
from tests.helpers.building import make_documents, save_llama, write_data_set
from tests.helpers.tokenizers import small_sentencepiece

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = "tools/bench/build.py"


def run(*words: object) -> str:
    ended = subprocess.run(
        [sys.executable, TOOL, *map(str, words)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def results_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    tokenizer = load_tokenizer(small_sentencepiece(directory))
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in make_documents(300)]
    write_sidecar(directory / "data", tokenizer)
    write_data_set(directory / "data", documents)
    donor = save_llama(directory / "donor")
    run(
        "--data-prefix", directory / "data", "--tokenizer-model", tokenizer.path, "--donor", donor, "--donor-layers", 1,
        "--rows", 300, "--rounds", 1, "--memory-gb", 0.25, "--memory-tokens", 200_000, "--build-dir", directory,
    )  # fmt: skip
    return directory / "building.json"


def test_what_is_compared_agrees(results_path: Path) -> None:
    results = json.loads(results_path.read_text())
    assert results["encode"]["difference"]["1"]["largest"] < 1e-5
    assert results["encode"]["from_float64"]["1"]["packs"]["largest"] < 1e-5
    assert results["encode"]["tokens_per_row"]["packs"] < results["encode"]["tokens_per_row"]["whole"]
    assert results["memory"]["within"] and results["memory"]["tokens"] == 200_000
    assert results["count"]["ours"]["kept"]["2"] > 100 and "not_measured" in results["count"]


def test_the_tables_show_every_target(results_path: Path) -> None:
    tables = run("--markdown", results_path)
    targets = json.loads(results_path.read_text())["targets"]
    assert len(targets) == 6 and all(target["name"] in tables for target in targets)
    unmeasured = [target["name"] for target in targets if target["met"] is None]
    assert unmeasured == ["count: against KenLM's lmplz, processor seconds"] and "not measured" in tables
