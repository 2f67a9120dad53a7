"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def reference_models() -> ModuleType:
    """The module tools/reference_models.py, which is no part of the package."""
    path = Path(__file__).parents[1] / "tools" / "reference_models.py"
    spec = importlib.util.spec_from_file_location("reference_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
