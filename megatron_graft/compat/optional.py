"""Which optional packages are really there, Transformer Engine and NVIDIA apex, and what that asks of a run on GPUs.

An import that raises anything at all counts as absent and is reported with its reason: a Transformer Engine without
its CUDA libraries raises ``RuntimeError``, and PyPI's ``apex`` is an unrelated project that imports without error.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found of one optional package.

    Attributes:
        name: the package, as a person would name it.
        usable: whether all the symbols we rely on could be imported.
        detail: version where usable, else the reason.
    """

    name: str
    usable: bool
    detail: str


def _probe(name: str, module: str, symbols: tuple[str, ...]) -> Probe:
    try:
        package = importlib.import_module(module.split(".")[0])
        loaded = importlib.import_module(module)
    except Exception as error:  # a broken install can raise anything
        return Probe(name=name, usable=False, detail=f"{type(error).__name__}: {error}")
    missing = [symbol for symbol in symbols if not hasattr(loaded, symbol)]
    if missing:
        return Probe(name=name, usable=False, detail=f"{module} lacks {', '.join(missing)}")
    return Probe(name=name, usable=True, detail=str(getattr(package, "__version__", "unknown version")))


def probe_transformer_engine() -> Probe:
    """Look for ``transformer_engine.pytorch`` with the modules that Megatron's layer spec uses."""
    return _probe("Transformer Engine", "transformer_engine.pytorch", ("Linear", "LayerNormLinear", "RMSNorm"))


def probe_apex() -> Probe:
    """Look for NVIDIA apex by its fused kernels, never by its name."""
    return _probe("NVIDIA apex", "apex.optimizers", ("FusedAdam",))


def probe_weight_gradient_kernel() -> Probe:
    """Look for apex's kernel that adds weight gradients up in place, which Megatron's own linear layers ask for."""
    importlib.import_module("torch")  # whose libraries the kernel is linked to
    return _probe(_WEIGHT_GRADIENT, _WEIGHT_GRADIENT, ("wgrad_gemm_accum_fp32",))


def cuda_flags() -> list[str]:
    """Megatron's flags for a GPU with what is installed: the layers' implementation, and fusions that have no kernel.

    With Transformer Engine the output layer is still one of Megatron's own.
    """
    engine = probe_transformer_engine().usable
    flags = ["--transformer-impl", "transformer_engine", "--moe-grouped-gemm"] if engine else [
        "--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion",
    ]  # fmt: skip
    return flags if probe_weight_gradient_kernel().usable else [*flags, "--no-gradient-accumulation-fusion"]


def describe_optional_packages() -> str:
    """One line for the log: what was found, or why not."""
    return "; ".join(
        f"{probe.name} {probe.detail if probe.usable else f'not used ({probe.detail})'}"
        for probe in (probe_transformer_engine(), probe_apex())
    )
