from __future__ import annotations

import importlib
import sys

import pytest

from megatron_graft.bank.extension import INTERFACE_VERSION, MODULE_NAME, load_extension
from megatron_graft.errors import NativeExtensionError


def test_the_built_extension_belongs_to_these_sources():
    assert load_extension().INTERFACE_VERSION == INTERFACE_VERSION


def test_a_missing_extension_names_the_command_that_builds_it(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE_NAME, None)  # what Python itself does to block an import
    with pytest.raises(NativeExtensionError, match="make native"):
        load_extension()


def test_an_extension_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.import_module(MODULE_NAME), "INTERFACE_VERSION", INTERFACE_VERSION + 1)
    with pytest.raises(NativeExtensionError, match="belongs to other sources.*make native"):
        load_extension()
