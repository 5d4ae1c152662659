"""The wheel carries the stubs and imports without torch; the README's example runs."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_wheel(repo_root, tmp_path):
    pytest.importorskip("setuptools")
    for name in ("python", "proto"):
        ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
        shutil.copytree(repo_root / name, tmp_path / name, ignore=ignored)
    flags = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q")
    built = python("-m", "pip", "wheel", *flags, "-w", tmp_path / "wheel", tmp_path / "python")
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"lockstep/v1/weights_pb2_grpc.py", "lockstep/py.typed"} < set(names)
    assert not any(name.startswith((".", "examples", "setup")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shutil.rmtree(tmp_path / "proto")
    code = "import sys; sys.modules.update(torch=None, transformers=None, grpc_tools=None); import lockstep, lockstep.parity; print(lockstep.v1.__path__)"
    ran = python("-c", code, PYTHONPATH=str(tmp_path / "site"))
    assert ran.returncode == 0 and str(tmp_path / "site") in ran.stdout, ran.stderr


def test_readme_example(repo_root, start_worker, tiny_model, monkeypatch, capsys):
    worker = start_worker(tiny_model)
    text = (pathlib.Path(repo_root) / "python" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(# generate.*?)```", text, re.S)
    monkeypatch.chdir(repo_root)
    exec(compile(code.replace("127.0.0.1:50051", worker.data), "README.md", "exec"), {})
    assert "mean |difference|" in capsys.readouterr().out
