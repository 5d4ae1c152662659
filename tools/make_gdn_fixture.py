#!/usr/bin/env python3
"""Cuts a small fixture of Gated DeltaNet's chunk program out of a GPU's recording.

    tools/make_gdn_fixture.py RECORDING.npz [OUT_DIR]

RECORDING.npz holds flash-linear-attention's chunk_gated_delta_rule on an H200, arrays [1, rows, heads, ...]: its inputs q, k (before the l2 norm),
v, beta, g, and its output o. One head and the first rows, which cross two chunk boundaries, go to OUT_DIR as raw little-endian arrays, bf16 as
its 16 bits. kernels/cpu/gdn_fixture_test.cc reads them.
"""

import argparse
import pathlib

import numpy as np

HEAD = 0
ROWS = 130
ARRAYS = {"q": "bf16", "k": "bf16", "v": "bf16", "beta": "f32", "g": "f32", "o": "bf16"}


def bf16_bits(values: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    if np.any(words & 0xFFFF):
        raise SystemExit("a value is not representable in bf16")
    return (words >> 16).astype("<u2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=pathlib.Path)
    default = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "gdn_fixture"
    parser.add_argument("out_dir", type=pathlib.Path, nargs="?", default=default)
    arguments = parser.parse_args()

    recording = np.load(arguments.recording)
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    for name, dtype in ARRAYS.items():
        values = recording[name][0, :ROWS, HEAD]
        data = bf16_bits(values) if dtype == "bf16" else np.ascontiguousarray(values, dtype="<f4")
        path = arguments.out_dir / f"{name}.{dtype}"
        path.write_bytes(data.tobytes())
        print(f"{path}: {list(values.shape)}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
