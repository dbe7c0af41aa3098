"""Functions that the processes of ranks find by name."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`rank_functions`, importable here and in processes that are started from here."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("rank_functions")
