"""Let the published, unmodified megatron-core run on CPU with gloo. A no-op where CUDA is present.

Call :func:`install` once, before the first ``import megatron``. Only names of the ``torch`` package are rebound, in
this process; no file is touched. What is rebound, and why:

* ``torch.cuda`` answers as one device that is the CPU: streams and events are already synchronised, the "CUDA"
  generator is the CPU generator, memory statistics are zero;
* tensor factories and ``.to`` map the device "cuda" to the CPU and drop ``pin_memory``;
* ``Tensor.type()`` answers with the CUDA spelling that Megatron's optimizers compare against;
* torch's compiler stays off (``TORCHDYNAMO_DISABLE``): Megatron decorates functions with it, and it stumbles over the
  stand-ins;
* some collectives of ``torch.distributed`` do what Megatron relies on NCCL for (:mod:`megatron_graft.compat.gloo`).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch

from megatron_graft.compat.gloo import rebind_collectives
from megatron_graft.errors import PlatformError

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "randperm", "eye", "linspace",
    "as_tensor", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_strided",
)  # fmt: skip
_MEMORY_FIGURES = (
    "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "device_memory_used",
    "memory_cached",
)  # fmt: skip
_installed = False


def install() -> bool:
    """Rebind what CPU needs; return True if this process runs on CPU.

    Raises:
        PlatformError: megatron was imported before, so that some names are bound to the originals.
    """
    global _installed
    if _installed:
        return True
    if torch.cuda.is_available():
        return False
    if any(name == "megatron" or name.startswith("megatron.") for name in sys.modules):
        raise PlatformError(
            "megatron_graft.compat.cpu",
            "was installed after megatron had been imported",
            remedy="Call megatron_graft.compat.cpu.install() before the first `import megatron`.",
        )
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _rebind_cuda_namespace()
    _rebind_cuda_generator()
    _rebind_factories()
    _rebind_tensor_methods()
    rebind_collectives()
    _installed = True
    return True


class _Stream:
    """A stream on which everything has already happened."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event if event is not None else _Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _Event:
    """An event that is complete as soon as it is recorded; it keeps wall time for ``elapsed_time``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded = 0.0

    def record(self, *_: Any) -> None:
        self._recorded = time.perf_counter()

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return (other._recorded - self._recorded) * 1e3


class _Generators:
    """``torch.cuda.default_generators[i]`` is the CPU generator for every i."""

    def __getitem__(self, _: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _rebind_cuda_namespace() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.is_available = lambda: True  # megatron.training refuses to start otherwise
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *_: None
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    cuda.Stream, cuda.Event, cuda.ExternalStream = _Stream, _Event, _Stream
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.set_stream = lambda *_: None
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_capability = lambda *_: (0, 0)
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(name="cpu", major=0, minor=0)
    cuda.get_device_name = lambda *_: "cpu"
    cuda.reset_peak_memory_stats = lambda *_: None
    cuda.memory_stats = lambda *_: collections.defaultdict(int)
    for name in _MEMORY_FIGURES:
        setattr(cuda, name, lambda *_, **__: 0)
    torch.accelerator.current_stream = lambda *_: stream  # type: ignore[assignment]  # asked by every optimizer step
    cuda.nvtx.range_push = cuda.nvtx.range_pop = cuda.nvtx.mark = lambda *_, **__: None


def _rebind_cuda_generator() -> None:
    """The "CUDA" generator is the CPU generator.

    ``manual_seed_all`` stays as it is: ``torch.manual_seed`` itself calls it. ``_lazy_call`` must run its callback at
    once: CUDA never initialises here, and Megatron's random-state tracker would wait for ever in the queue.
    """
    cuda: Any = torch.cuda

    def get_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    cuda.default_generators = _Generators()
    cuda.manual_seed = cuda.random.manual_seed = torch.default_generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state
    cuda._lazy_call = lambda callback, **_: callback()
    cuda._lazy_init = lambda: None


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _rebind_factories() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _rebind_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = lambda self, *_, **__: self
    module.cuda = lambda self, *_, **__: self
    tensor.record_stream = lambda self, *_: None
    tensor.pin_memory = lambda self, *_, **__: self
    tensor.to, module.to = _to_on_cpu(tensor.to), _to_on_cpu(module.to)
    original_type = tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    tensor.type = type_


def _to_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original(self, *args, **kwargs)

    return to
