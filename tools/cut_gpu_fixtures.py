#!/usr/bin/env python3
"""Cuts the small fixture of kernels/oracle's tests out of a GPU's recordings.

    tools/cut_gpu_fixtures.py GDN.npz TORCH_OPS.npz INSTRUCTIONS.npz [OUT_DIR]

GDN.npz: flash-linear-attention's chunk_gated_delta_rule with all intermediates, arrays [1, rows, heads, ...] of bf16 or fp32 values in fp32.
TORCH_OPS.npz: PyTorch's operations, bf16 as its 16 bits. INSTRUCTIONS.npz: single tensor-core steps of ten kinds of operands, and the special
functions at chosen arguments. All of one H200. The cut goes to OUT_DIR as raw little-endian arrays; its README.md says what each one is. What
tests/data/gdn_fixture and tests/data/torch_ops hold already is not repeated.
"""

import argparse
import pathlib

import numpy as np

GDN_HEAD = 0  # the head and the rows of tests/data/gdn_fixture
GDN_ROWS = 130
CHUNK = 64
ATTENTION_HEAD = 1
ATTENTION_KEYS = 420  # four tiles of 128, seven of 64
ATTENTION_ROWS = (0, 1, 5, 63, 64, 100, 127, 128, 200, 255, 256, 278, 300, 317, 353, 377, 384, 400, 419)
STEP_TILES = 3  # of each kind of operands; a tile is 128 steps
CONV_CHANNELS = 48
F32_POINTS = 2048


def bf16_bits(values: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    if np.any(words & 0xFFFF):
        raise SystemExit("a value is not representable in bf16")
    return (words >> 16).astype("<u2")


def cut_gdn(recording) -> dict:
    rows = {name: recording[name][0, :GDN_ROWS, GDN_HEAD] for name in ("qn", "kn", "G", "Araw", "A32", "w", "u", "vn")}
    return {
        "gdn_qn.bf16": bf16_bits(rows["qn"]),
        "gdn_kn.bf16": bf16_bits(rows["kn"]),
        "gdn_decay.f32": rows["G"],
        "gdn_gram.f32": rows["Araw"],
        "gdn_inverse.f32": rows["A32"],
        "gdn_w.bf16": bf16_bits(rows["w"]),
        "gdn_u.bf16": bf16_bits(rows["u"]),
        "gdn_delta.bf16": bf16_bits(rows["vn"]),
        "gdn_state2.f32": recording["S2"][0, GDN_HEAD],
        "gdn_exp2_tile.f32": recording["E"][0, :, :, GDN_HEAD],
    }


def cut_attention(recording) -> dict:
    head = {name: recording[f"att_{name}"][0, ATTENTION_HEAD] for name in ("q", "k", "v", "flash", "cudnn")}
    rows = list(ATTENTION_ROWS)
    return {
        "attention_rows.i32": np.array(rows, dtype="<i4"),
        "attention_q.bf16": head["q"][rows],
        "attention_k.bf16": head["k"][:ATTENTION_KEYS],
        "attention_v.bf16": head["v"][:ATTENTION_KEYS],
        "attention_flash.bf16": head["flash"][rows],
        "attention_cudnn.bf16": head["cudnn"][rows],
    }


def cut_rows(recording) -> dict:
    arrays = {
        "logits.bf16": recording["logits"][0],
        "log_softmax.f32": recording["logsoftmax_f32_at"][0],
        "conv_x.bf16": recording["conv_x"][0, :CONV_CHANNELS],
        "conv_w.bf16": recording["conv_w"][:CONV_CHANNELS],
        "conv_y.bf16": recording["conv_y"][0, :CONV_CHANNELS],
        "conv_silu.bf16": recording["conv_silu"][0, :CONV_CHANNELS],
        # Every second bf16 value from 2^-7 to 2^6, both signs.
        "sigmoid.bf16": recording["unary_sigmoid"].reshape(2, 32768)[:, 0x3C00:0x4280:2],
    }
    stride = len(recording["f32_x"]) // F32_POINTS
    for name in ("x", "softplus", "silu"):
        arrays[f"{name}.f32"] = recording[f"f32_{name}"][::stride]
    return arrays


def cut_instructions(recording) -> dict:
    arrays = {}
    for name, dtype in (("bf16_a", "bf16"), ("bf16_b", "bf16"), ("bf16_c", "f32"), ("bf16_d", "f32")):
        arrays[f"step_{name}.{dtype}"] = recording[f"mma_{name}"][:, :STEP_TILES]
    for name in ("tf32_a", "tf32_b", "tf32_c", "tf32_d"):
        arrays[f"step_{name}.f32"] = recording[f"mma_{name}"][:, :STEP_TILES]
    arrays["special_x.f32"] = recording["special_x"][:1024]
    arrays["special_y.f32"] = recording["special_y"][:1024]
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gdn", type=pathlib.Path)
    parser.add_argument("torch_ops", type=pathlib.Path)
    parser.add_argument("instructions", type=pathlib.Path)
    default = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "gpu_bits"
    parser.add_argument("out_dir", type=pathlib.Path, nargs="?", default=default)
    arguments = parser.parse_args()

    torch_ops = np.load(arguments.torch_ops)
    arrays = cut_gdn(np.load(arguments.gdn)) | cut_attention(torch_ops) | cut_rows(torch_ops)
    arrays |= cut_instructions(np.load(arguments.instructions))

    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    dtypes = {"bf16": "<u2", "f32": "<f4", "i32": "<i4"}
    total = 0
    for name, values in arrays.items():
        path = arguments.out_dir / name
        path.write_bytes(np.ascontiguousarray(values, dtype=dtypes[name.rsplit(".", 1)[1]]).tobytes())
        total += path.stat().st_size
        print(f"{path}: {list(values.shape)}, {path.stat().st_size} bytes")
    print(f"{total} bytes in all")


if __name__ == "__main__":
    main()
