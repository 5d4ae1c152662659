import checkpoints
import pytest


@pytest.fixture(scope="module")
def old(tiny_model):
    """The tensors of the tiny checkpoint, by name."""
    return checkpoints.read(tiny_model)


@pytest.fixture(scope="module")
def new(old):
    """Others of the same shapes."""
    return checkpoints.perturb(old, 1)
