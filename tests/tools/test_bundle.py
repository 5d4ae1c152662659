import pathlib
import subprocess
import sys

import pytest
from bundle_libraries import is_system_library, needed_libraries, parse_ldd

LDD = """\
\tlinux-vdso.so.1 (0x00007ffd5a5f2000)
\tlibgrpc++.so.1.51 => /lib/x86_64-linux-gnu/libgrpc++.so.1.51 (0x00007f5b0c000000)
\tlibabsl_status.so.20220623 => /lib/x86_64-linux-gnu/libabsl_status.so.20220623 (0x00007f5b0bfe1000)
\tlibcuda.so.1 => not found
\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f5b0b000000)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f5b0d000000)
"""


def test_parse_ldd():
    assert parse_ldd(LDD) == {
        "libgrpc++.so.1.51": "/lib/x86_64-linux-gnu/libgrpc++.so.1.51",
        "libabsl_status.so.20220623": "/lib/x86_64-linux-gnu/libabsl_status.so.20220623",
        "libc.so.6": "/lib/x86_64-linux-gnu/libc.so.6",
    }
    with pytest.raises(ValueError, match="libmissing.so.1"):
        parse_ldd("\tlibmissing.so.1 => not found\n")


@pytest.mark.parametrize("name", ["libc.so.6", "libstdc++.so.6", "ld-linux-x86-64.so.2", "libcuda.so.1", "libm.so.6"])
def test_system_libraries_stay_behind(name):
    assert is_system_library(name)


@pytest.mark.parametrize("name", ["libcares.so.2", "libcrypto.so.3", "libabsl_cord.so.20220623", "libmagic.so.1"])
def test_others_come_along(name):
    assert not is_system_library(name)


def test_needs_of_a_real_program():
    needed = needed_libraries([pathlib.Path(sys.executable).resolve()])
    assert not [name for name in needed if is_system_library(name)]
    assert all(path.is_absolute() and path.exists() for path in needed.values())


def test_sizes_are_sorted(script, tmp_path):
    (tmp_path / "small").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "large").write_bytes(b"x" * 100)
    assert script("bundle").sizes(tmp_path) == [(100, "folder"), (1, "small")]


def test_run_puts_packages_and_library_on_the_paths(script, tmp_path):
    run = tmp_path / "a folder" / "run"
    script("bundle").write_executable(run, script("bundle").RUN_WRAPPER)
    tool = run.parent / "tools" / "show"
    script("bundle").write_executable(tool, '#!/bin/sh\necho "$PYTHONPATH|$LD_LIBRARY_PATH|$LOCKSTEP_BIN|$1"\n')
    command = [str(run), "tools/show", "an argument"]
    environment = {"PATH": "/usr/bin:/bin"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    here = str(run.parent)
    assert out == f"{here}/site|{here}/lib/python|{here}/bin|an argument"
