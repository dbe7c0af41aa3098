"""Random models for the native engine's tests; torch is imported only where one is asked for."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.serving.domain.artifact import Manifest, Precision

BuildModel = Callable[[str, Path, Precision], tuple[Any, Manifest]]


@pytest.fixture(scope="session")
def build_model() -> BuildModel:
    """`build` of small_models.py: variant, folder and precision to reference and manifest."""
    path = Path(__file__).with_name("small_models.py")
    spec = importlib.util.spec_from_file_location("small_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build
