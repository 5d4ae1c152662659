"""The gRPC stubs of proto/lockstep/v1: in a wheel they lie beside this file; in a source tree they are generated.

Imports nothing of the package, so that setup.py and tools/lockstep_stubs.py can use it before stubs exist.
"""

from __future__ import annotations

import fcntl
import os
import pathlib

HERE = pathlib.Path(__file__).resolve().parent


def _stale(out: pathlib.Path, proto_dir: pathlib.Path, protos: list[pathlib.Path]) -> bool:
    for proto in protos:
        stem = out / proto.relative_to(proto_dir).with_suffix("")
        for suffix in ("_pb2.py", "_pb2_grpc.py"):
            stub = pathlib.Path(f"{stem}{suffix}")
            if not stub.exists() or stub.stat().st_mtime < proto.stat().st_mtime:
                return True
    return False


def generate(proto_dir: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Brings out/lockstep/v1/*_pb2*.py up to date with proto_dir/lockstep/v1/*.proto and returns `out`.

    Safe when several processes call it at once. Raises RuntimeError if protoc fails or grpcio-tools is not installed.
    """
    protos = sorted((proto_dir / "lockstep" / "v1").glob("*.proto"))
    if not protos:
        raise RuntimeError(f"no .proto files in {proto_dir / 'lockstep' / 'v1'}")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _stale(out, proto_dir, protos):
            try:
                from grpc_tools import protoc
            except ImportError as error:
                raise RuntimeError(
                    "generating Lockstep's stubs needs grpcio-tools: pip install grpcio-tools"
                ) from error
            arguments = ["protoc", f"-I{proto_dir}", f"--python_out={out}", f"--grpc_python_out={out}"]
            if protoc.main(arguments + [str(path.relative_to(proto_dir)) for path in protos]) != 0:
                raise RuntimeError(f"protoc could not generate stubs from {proto_dir}")
    return out


def package_path() -> list[str]:
    """What the package's __path__ needs besides its own folder so that `lockstep.v1` can be imported."""
    if (HERE / "v1" / "rollout_pb2.py").exists():
        return []
    root = HERE.parent.parent
    if not (root / "proto" / "lockstep" / "v1" / "rollout.proto").exists():
        raise ImportError(f"{HERE} has no v1/ with generated stubs and no source tree around it: install the wheel")
    out = pathlib.Path(os.environ.get("LOCKSTEP_STUBS", root / "build" / "python"))
    return [str(generate(root / "proto", out) / "lockstep")]
