"""Python stubs of proto/lockstep/v1, generated when they are missing or older than the .proto files.

    stubs = lockstep_stubs.load()
    stubs.pb.GenerateRequest(...), stubs.grpc.RolloutStub(channel)

The generator is the Python package's (python/lockstep/_stubs.py); the modules are those it uses.
"""

import importlib
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent


def load() -> types.SimpleNamespace:
    """The modules of rollout.proto: `pb` (messages) and `grpc` (stub and servicer)."""
    python = str(ROOT / "python")
    if python not in sys.path:
        sys.path.insert(0, python)
    return types.SimpleNamespace(
        pb=importlib.import_module("lockstep.v1.rollout_pb2"),
        grpc=importlib.import_module("lockstep.v1.rollout_pb2_grpc"),
    )
