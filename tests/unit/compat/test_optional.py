"""Detection with fakes on the path: installed packages of these names come in working, broken and unrelated forms."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_graft.compat.optional import cuda_flags, probe_apex, probe_transformer_engine

Fake = Callable[[dict[str, str]], None]
NAMES = ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put packages on the path: file below it -> its source."""
    for name in [name for name in sys.modules if name.split(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files: dict[str, str]) -> None:
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    yield write  # type: ignore[misc]
    for name in [name for name in sys.modules if name.split(".")[0] in NAMES]:
        del sys.modules[name]


def test_a_working_transformer_engine_is_found_with_its_version(fake: Fake) -> None:
    fake({
        "transformer_engine/__init__.py": "__version__ = '2.20.2'",
        "transformer_engine/pytorch/__init__.py": "Linear = LayerNormLinear = RMSNorm = object",
    })  # fmt: skip
    probe = probe_transformer_engine()
    assert probe.usable
    assert probe.detail == "2.20.2"


def test_a_transformer_engine_whose_import_raises_is_absent_with_the_reason(fake: Fake) -> None:
    fake({"transformer_engine/__init__.py": "raise RuntimeError('cudnn shared object not found.')"})
    probe = probe_transformer_engine()
    assert not probe.usable
    assert probe.detail == "RuntimeError: cudnn shared object not found."


def test_a_transformer_engine_without_its_torch_part_is_absent(fake: Fake) -> None:
    fake({"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": "Linear = object"})
    probe = probe_transformer_engine()
    assert not probe.usable
    assert probe.detail == "transformer_engine.pytorch lacks LayerNormLinear, RMSNorm"


def test_the_unrelated_package_called_apex_is_not_taken_for_nvidias(fake: Fake) -> None:
    fake({"apex/__init__.py": "__version__ = '0.9.10dev'"})
    assert not probe_apex().usable


def test_an_apex_whose_kernels_do_not_load_is_absent(fake: Fake) -> None:
    fake({"apex/__init__.py": "", "apex/optimizers/__init__.py": "import amp_C_that_was_never_built"})
    probe = probe_apex()
    assert not probe.usable
    assert probe.detail.startswith("ModuleNotFoundError")


def test_nvidias_apex_is_found_by_its_fused_optimizer(fake: Fake) -> None:
    fake({"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedAdam: pass"})
    assert probe_apex().usable


def test_nothing_installed_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert not probe_transformer_engine().usable


LOCAL = ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"]
ENGINE = ["--transformer-impl", "transformer_engine", "--moe-grouped-gemm"]
UNFUSED = "--no-gradient-accumulation-fusion"


@pytest.mark.parametrize(
    ("engine", "kernel", "flags"),
    [(False, False, [*LOCAL, UNFUSED]), (False, True, LOCAL), (True, False, [*ENGINE, UNFUSED]), (True, True, ENGINE)],
)
def test_a_run_on_gpus_asks_for_the_kernels_that_are_there(
    fake: Fake, engine: bool, kernel: bool, flags: list[str]
) -> None:
    if engine:
        fake({
            "transformer_engine/__init__.py": "",
            "transformer_engine/pytorch/__init__.py": "Linear = LayerNormLinear = RMSNorm = object",
        })  # fmt: skip
    if kernel:
        fake({"fused_weight_gradient_mlp_cuda.py": "wgrad_gemm_accum_fp32 = object"})
    assert cuda_flags() == flags
