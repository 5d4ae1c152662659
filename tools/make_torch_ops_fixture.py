#!/usr/bin/env python3
"""Cuts a small fixture of PyTorch's element-wise and reduction operations out of a GPU's recording.

    tools/make_torch_ops_fixture.py RECORDING.npz [OUT_DIR]

RECORDING.npz holds PyTorch's RMSNorm of 300 rows (the first 70 recorded; eps 1e-6) and its silu of every bf16 value, bf16 as its 16 bits. The
first rows go to OUT_DIR as raw little-endian arrays. kernels/rms_norm_order_test.cc and kernels/cuda/cuda_ops_test.cu read them.
"""

import argparse
import pathlib

import numpy as np

ROWS = {3840: 12, 192: 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=pathlib.Path)
    default = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "torch_ops"
    parser.add_argument("out_dir", type=pathlib.Path, nargs="?", default=default)
    arguments = parser.parse_args()

    recording = np.load(arguments.recording)
    arrays = {"unary_silu.bf16": recording["unary_silu"]}
    for width, rows in ROWS.items():
        arrays[f"rms{width}_x.bf16"] = recording[f"rms{width}_x"][:rows]
        arrays[f"rms{width}_w.bf16"] = recording[f"rms{width}_w"]
        arrays[f"rms{width}_mean.f32"] = recording[f"rms{width}_mean_m300"][:rows]
        arrays[f"rms{width}_y.bf16"] = recording[f"rms{width}_y_m300"][:rows]

    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        path = arguments.out_dir / name
        path.write_bytes(np.ascontiguousarray(values, dtype="<u2" if name.endswith(".bf16") else "<f4").tobytes())
        print(f"{path}: {list(values.shape)}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
