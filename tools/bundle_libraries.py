"""Which shared libraries a program needs and a machine with a GPU may lack."""

import pathlib
import re
import subprocess

# Every glibc system has these, and its own must be used: they belong to its loader, its compiler's run time or its
# driver. NVIDIA's come with the driver or with PyTorch.
_SYSTEM = re.compile(
    r"^(linux-vdso|ld-linux.*|libc|libm|libdl|librt|libpthread|libresolv|libutil|libanl|libnss_.*|libmvec"
    r"|libstdc\+\+|libgcc_s"
    r"|libcuda|libcudart|libcublas|libcublasLt|libnccl|libcudnn.*|libnvidia-.*|libnvrtc.*)\.so(\..*)?$"
)


def is_system_library(name):
    return _SYSTEM.match(name) is not None


def parse_ldd(text):
    """{name: path} of ldd's output. A library that ldd did not find is an error, unless it is a system one."""
    found = {}
    for line in text.splitlines():
        line = line.strip()
        missing = re.match(r"^(\S+) => not found$", line)
        if missing and not is_system_library(missing[1]):
            raise ValueError(f"{missing[1]} is not on this machine")
        match = re.match(r"^(\S+) => (/\S+) \(0x[0-9a-f]+\)$", line)
        if match:
            found[match[1]] = match[2]
    return found


def needed_libraries(binaries):
    """{name: path} of all that the binaries need, their libraries' needs included, without system libraries."""
    found = {}
    for binary in binaries:
        result = subprocess.run(["ldd", str(binary)], capture_output=True, text=True)
        if result.returncode != 0:
            if "not a dynamic executable" in result.stdout + result.stderr:
                continue
            raise RuntimeError(f"ldd {binary}: {result.stderr}")
        try:
            found |= parse_ldd(result.stdout)
        except ValueError as error:
            raise RuntimeError(f"{binary}: {error}") from None
    return {name: pathlib.Path(path) for name, path in sorted(found.items()) if not is_system_library(name)}
