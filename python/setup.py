"""Builds the wheel with the gRPC stubs in it: lockstep/v1/*_pb2.py, generated from ../proto (in an sdist: ./proto)."""

import importlib.metadata
import importlib.util
import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = pathlib.Path(__file__).resolve().parent
PROTO = next((path for path in (HERE / "proto", HERE.parent / "proto") if path.is_dir()), None)


def generator():
    """lockstep/_stubs.py, without importing the package (which needs what is about to be generated)."""
    spec = importlib.util.spec_from_file_location("lockstep_stubs_generator", HERE / "lockstep" / "_stubs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithStubs(build_py):
    def run(self):
        super().run()
        if PROTO is None:
            raise FileNotFoundError("proto/lockstep/v1: not beside python/, and not in it")
        if self.editable_mode:
            generator().generate(PROTO, HERE.parent / "build" / "python")
        else:
            out = generator().generate(PROTO, pathlib.Path(self.build_lib))
            (out / ".lock").unlink()

    def get_outputs(self, *arguments, **keywords):
        stubs = [] if self.editable_mode else [str(p) for p in pathlib.Path(self.build_lib, "lockstep/v1").glob("*.py")]
        return super().get_outputs(*arguments, **keywords) + stubs


class SdistWithProto(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        shutil.copytree(PROTO, pathlib.Path(base_dir) / "proto", dirs_exist_ok=True)


setup(
    cmdclass={"build_py": BuildWithStubs, "sdist": SdistWithProto},
    install_requires=[
        f"grpcio>={importlib.metadata.version('grpcio')}",
        f"protobuf>={importlib.metadata.version('protobuf')}",
        "grpcio-health-checking>=1.62",
        "numpy>=1.26",
    ],
)
