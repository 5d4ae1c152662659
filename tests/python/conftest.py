import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "python"))


@pytest.fixture(scope="session")
def fake_nccl(build_dir):
    """The path of tests/fake_nccl's library."""
    path = build_dir / "lib" / "libfake_nccl.so"
    assert path.exists(), f"{path} was never built: cmake --build {build_dir} --target fake_nccl"
    return str(path)


@pytest.fixture
def trainer(tiny_model):
    from lockstep.hf import TransformersTrainer

    return TransformersTrainer(tiny_model, device="cpu", dtype="float32")
