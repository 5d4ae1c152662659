"""Python stubs of proto/lockstep/v1, generated when they are missing or older than the .proto files.

    stubs = lockstep_stubs.load()
    stubs.pb.GenerateRequest(...), stubs.grpc.RolloutStub(channel)
"""

import fcntl
import importlib
import os
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROTO_DIR = ROOT / "proto"


def output_dir() -> pathlib.Path:
    """Where the stubs go: $LOCKSTEP_STUBS, else build/python."""
    return pathlib.Path(os.environ.get("LOCKSTEP_STUBS", ROOT / "build" / "python"))


def _stale(out: pathlib.Path, protos: list[pathlib.Path]) -> bool:
    for proto in protos:
        stem = out / proto.relative_to(PROTO_DIR).with_suffix("")
        for suffix in ("_pb2.py", "_pb2_grpc.py"):
            stub = pathlib.Path(f"{stem}{suffix}")
            if not stub.exists() or stub.stat().st_mtime < proto.stat().st_mtime:
                return True
    return False


def generate() -> pathlib.Path:
    """Brings the stubs up to date and returns the directory to import them from."""
    out = output_dir()
    protos = sorted((PROTO_DIR / "lockstep" / "v1").glob("*.proto"))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:  # several tests may start at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _stale(out, protos):
            from grpc_tools import protoc

            arguments = ["protoc", f"-I{PROTO_DIR}", f"--python_out={out}", f"--grpc_python_out={out}"]
            if protoc.main(arguments + [str(p.relative_to(PROTO_DIR)) for p in protos]) != 0:
                raise RuntimeError(f"protoc could not generate stubs from {PROTO_DIR}")
    return out


def load() -> types.SimpleNamespace:
    """The modules of rollout.proto: `pb` (messages) and `grpc` (stub and servicer)."""
    out = str(generate())
    if out not in sys.path:
        sys.path.insert(0, out)
    return types.SimpleNamespace(
        pb=importlib.import_module("lockstep.v1.rollout_pb2"),
        grpc=importlib.import_module("lockstep.v1.rollout_pb2_grpc"),
    )
