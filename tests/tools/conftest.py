"""Makes the tools' modules importable, and the scripts without a suffix too."""

import importlib.machinery
import importlib.util
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "gpu")]


@pytest.fixture(scope="session")
def script():
    """script(name) -> the module of tools/NAME."""

    def load(name):
        loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "tools" / name))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        sys.modules[name] = module  # dataclasses look their module up
        loader.exec_module(module)
        return module

    return load
