#!/usr/bin/env python3
"""The linear layer beside PyTorch's own, bit for bit at every number of rows, with timings beside cuBLAS. The one that ends in SwiGLU beside PyTorch's, with
timings beside the linear layer and SwiGLU as two kernels.

Needs a Hopper GPU and torch. The library is liblockstep_cuda.so, or $LOCKSTEP_CUDA_LIBRARY. Ends with 1 if any bit differs. With --json, or $JOB_OUT set, the
timings are written as JSON. Rate: TB/s of weight bytes below 512 rows, where memory is the bound; TFLOP/s of 2mnk from there on.
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

# name: width in, widths out (side by side in one weight)
SHAPES = {
    "gate_up": (3840, (11008, 11008)),
    "down": (11008, (3840,)),
    "gdn_in": (3840, (2880, 2880, 5760, 5760, 30, 30)),
    "gdn_o": (5760, (3840,)),
    "attention_qkv": (3840, (3840, 3840, 3840)),
    "attention_o": (3840, (3840,)),
    "head": (3840, (100352,)),
    "olmo3_qkv": (4096, (4096, 4096, 4096)),
    "olmo3_o": (4096, (4096,)),
    "olmo3_gate_up": (4096, (11008, 11008)),
    "olmo3_down": (11008, (4096,)),
    "olmo3_head": (4096, (100278,)),
    "tiny_in": (256, (192, 192, 384, 384, 2, 2)),
    "tiny_gate_up": (256, (768, 768)),
    "tiny_down": (768, (256,)),
    "tiny_head": (256, (512,)),
}
TRAINER_ROWS = 2048
ROWS = (1, 2, 7, 16, 33, 64, 128, 200, 256, 288, 512, 2048)
LONG_SHAPES = ("gdn_in", "down", "gdn_o")
LONG_ROWS = (8192, 16384)
SWIGLU_SHAPES = ("gate_up", "olmo3_gate_up", "tiny_gate_up")
TIMED_SHAPES = ("gate_up", "down", "gdn_in", "gdn_o", "attention_qkv", "attention_o", "head")
TIMED_ROWS = (1, 16, 32, 64, 128, 256, 2048, 8192)
ROTATED_BYTES = 260e6  # several times the L2 cache
MARGIN = 8

lib = None


def load_library():
    global lib
    path = os.environ.get("LOCKSTEP_CUDA_LIBRARY", "liblockstep_cuda.so")
    lib = ctypes.CDLL(str(pathlib.Path(path).resolve()) if os.path.exists(path) else path)
    lib.lockstep_last_error.restype = ctypes.c_char_p
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    lib.lockstep_linear.argtypes = [pointer, count, pointer, pointer, count, ctypes.c_int, count, count, count, ctypes.c_int, pointer]
    lib.lockstep_linear_swiglu.argtypes = [pointer, count, pointer, pointer, count, count, count, count, ctypes.c_int, pointer]
    lib.lockstep_swiglu.argtypes = [pointer, pointer, count, count, count, count, pointer]


def linear(x, weight, out, early_start=False):
    stream = torch.cuda.current_stream().cuda_stream
    status = lib.lockstep_linear(x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), out.stride(0), int(out.dtype == torch.float32), x.shape[0],
                                 weight.shape[0], weight.shape[1], int(early_start), stream)
    if status != 0:
        raise RuntimeError(f"lockstep_linear: {lib.lockstep_last_error().decode()}")


def linear_swiglu(x, weight, out, early_start=False):
    stream = torch.cuda.current_stream().cuda_stream
    status = lib.lockstep_linear_swiglu(x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), out.stride(0), x.shape[0], out.shape[1], weight.shape[1],
                                        int(early_start), stream)
    if status != 0:
        raise RuntimeError(f"lockstep_linear_swiglu: {lib.lockstep_last_error().decode()}")


def swiglu(gate_up, out):
    stream = torch.cuda.current_stream().cuda_stream
    status = lib.lockstep_swiglu(gate_up.data_ptr(), out.data_ptr(), out.shape[0], out.shape[1], gate_up.stride(0), out.stride(0), stream)
    if status != 0:
        raise RuntimeError(f"lockstep_swiglu: {lib.lockstep_last_error().decode()}")


def bits(t):
    return t.contiguous().view(torch.int16 if t.dtype == torch.bfloat16 else torch.int32)


def pad(n):
    return (n + 63) // 64 * 64 if n < 64 else (n + 7) // 8 * 8


def make_operands(name, rows):
    """x, the trainer's separate weights and the fused, padded one with the same numbers."""
    k, widths = SHAPES[name]
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    if rows > 6:
        x[5] = 0.0
        x[6] = -x[6].abs() * 0.0
    parts = [(torch.randn(n, k, device="cuda") * 0.02).bfloat16() for n in widths]
    fused = torch.zeros(pad(sum(widths)), k, device="cuda", dtype=torch.bfloat16)
    torch.cat(parts, out=fused[: sum(widths)])
    return x, parts, fused


def check(name, row_counts, trainer_rows):
    """The trainer's rows are those of one forward over trainer_rows; ours must be equal whatever their number."""
    x, parts, fused = make_operands(name, trainer_rows)
    want = torch.cat([F.linear(x, part) for part in parts], dim=1)
    differing = 0
    compared = 0
    n = fused.shape[0]
    for dtype in (torch.bfloat16, torch.float32):
        for rows in row_counts:
            poison = torch.full((rows + MARGIN, n + MARGIN), float("nan"), device="cuda", dtype=dtype)
            out = poison.clone()
            linear(x[:rows], fused, out[:rows, :n])
            got = out[:rows, : want.shape[1]].to(torch.bfloat16)
            wrong = bits(got) != bits(want[:rows])
            compared += wrong.numel()
            count = int(wrong.sum())
            differing += count
            if count:
                row, col = wrong.nonzero()[0].tolist()
                print(f"  {name} {rows} rows {dtype}: {count} differ; first [{row}, {col}] {got[row, col].item()!r}, want {want[row, col].item()!r}")
            if not torch.equal(bits(out[rows:]), bits(poison[rows:])) or not torch.equal(bits(out[:, n:]), bits(poison[:, n:])):
                print(f"  {name} {rows} rows {dtype}: written outside of the output")
                differing += 1
            if not bool((out[:rows, want.shape[1] : n] == 0).all()):
                print(f"  {name} {rows} rows {dtype}: padding features are not zero")
                differing += 1
        if n * trainer_rows > 1 << 28:
            break  # the fp32 form of the largest outputs is one form too many for the card's memory
    print(f"{name:14s} k {x.shape[1]:6d} n {want.shape[1]:7d} rows {row_counts}: {differing} of {compared} differ", flush=True)
    return differing


def check_swiglu(name, row_counts, trainer_rows):
    """The trainer's MLP up to its down projection, and our two kernels, over trainer_rows; our one must be equal to both whatever the rows."""
    x, parts, fused = make_operands(name, trainer_rows)
    n = parts[0].shape[0]
    want = F.silu(F.linear(x, parts[0])) * F.linear(x, parts[1])
    gate_up = torch.empty(trainer_rows, 2 * n, device="cuda", dtype=torch.bfloat16)
    unfused = torch.empty(trainer_rows, n, device="cuda", dtype=torch.bfloat16)
    linear(x, fused, gate_up)
    swiglu(gate_up, unfused)
    differing = 0
    compared = 0
    for rows in row_counts:
        poison = torch.full((rows + MARGIN, n + MARGIN), float("nan"), device="cuda", dtype=torch.bfloat16)
        out = poison.clone()
        linear_swiglu(x[:rows], fused, out[:rows, :n])
        for other, values in (("PyTorch", want), ("two kernels", unfused)):
            wrong = bits(out[:rows, :n]) != bits(values[:rows])
            compared += wrong.numel()
            count = int(wrong.sum())
            differing += count
            if count:
                row, col = wrong.nonzero()[0].tolist()
                got, wanted = out[row, col].item(), values[row, col].item()
                print(f"  {name} with SwiGLU {rows} rows: {count} differ from {other}; first [{row}, {col}] {got!r}, want {wanted!r}")
        if not torch.equal(bits(out[rows:]), bits(poison[rows:])) or not torch.equal(bits(out[:, n:]), bits(poison[:, n:])):
            print(f"  {name} with SwiGLU {rows} rows: written outside of the output")
            differing += 1
    print(f"{name + '_swiglu':14s} k {x.shape[1]:6d} n {n:7d} rows {row_counts}: {differing} of {compared} differ", flush=True)
    return differing


def time_us(call, buffers):
    """Microseconds a call in a CUDA graph, each call with the next buffer."""
    count = max(len(buffers), 8)
    call(buffers[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(buffers[i % len(buffers)])
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def copy_tb_s():
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_us(lambda _: target.copy_(source), [None]) / 1e6


def measure(seconds):
    begin = time.time()
    results = []
    copy = copy_tb_s()
    print(f"{torch.cuda.get_device_name()}; copy {copy:.2f} TB/s; us in a graph, weights rotated; early: our early_start; rate of ours without it")
    print(f"{'shape':14s} {'rows':>6s} {'ours':>9s} {'early':>9s} {'cuBLAS':>9s} {'ratio':>6s}  rate")
    for name in TIMED_SHAPES:
        x, _, fused = make_operands(name, max(TIMED_ROWS))
        n, k = fused.shape
        weights = [fused] + [fused.clone() for _ in range(min(64, int(ROTATED_BYTES / (2 * n * k))))]
        for rows in TIMED_ROWS:
            if time.time() - begin > seconds:
                print("out of time")
                return results
            if rows * n > 1 << 29:
                continue
            some = x[:rows]
            out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
            ours = time_us(lambda w: linear(some, w, out), weights)
            early = time_us(lambda w: linear(some, w, out, early_start=True), weights)
            peer = time_us(lambda w: torch.mm(some, w.t(), out=out), weights)
            tb_s, tflop_s = 2 * n * k / ours / 1e6, 2 * rows * n * k / ours / 1e6
            rate = f"{tb_s:.2f} TB/s, {tb_s / copy:.0%} of copy" if rows < 512 else f"{tflop_s:.0f} TFLOP/s"
            print(f"{name:14s} {rows:6d} {ours:9.2f} {early:9.2f} {peer:9.2f} {peer / ours:6.2f}  {rate}", flush=True)
            results.append({"name": "linear", "shape": f"{name} {rows}x{n}x{k}", "us": ours, "early_us": early, "peer": "cuBLAS", "peer_us": peer,
                            "ratio": peer / ours, "bytes": 2 * n * k, "tb_s": tb_s, "tflop_s": tflop_s})
    return results


def measure_swiglu():
    """Like measure(), the peer being our linear layer followed by SwiGLU; early: both with early starts, as the engine runs them."""
    results = []
    print(f"{'shape':18s} {'rows':>6s} {'one':>9s} {'early':>9s} {'two':>9s} {'early':>9s} {'ratio':>6s}")
    x, _, fused = make_operands("gate_up", max(TIMED_ROWS))
    n, k = fused.shape[0] // 2, fused.shape[1]
    weights = [fused] + [fused.clone() for _ in range(min(64, int(ROTATED_BYTES / (4 * n * k))))]
    for rows in TIMED_ROWS:
        some = x[:rows]
        gate_up = torch.empty(rows, 2 * n, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)

        def two(weight, early_start):
            linear(some, weight, gate_up, early_start=early_start)
            swiglu(gate_up, out)

        us = [time_us(lambda w: linear_swiglu(some, w, out, early_start=early), weights) for early in (False, True)]
        peer = [time_us(lambda w: two(w, early), weights) for early in (False, True)]
        print(f"{'gate_up_swiglu':18s} {rows:6d} {us[0]:9.2f} {us[1]:9.2f} {peer[0]:9.2f} {peer[1]:9.2f} {peer[1] / us[1]:6.2f}", flush=True)
        results.append({"name": "linear", "shape": f"gate_up_swiglu {rows}x{2 * n}x{k}", "us": us[0], "early_us": us[1], "peer": "ours, two kernels",
                        "peer_us": peer[0], "peer_early_us": peer[1], "ratio": peer[0] / us[0], "bytes": 4 * n * k, "tb_s": 4 * n * k / us[0] / 1e6,
                        "tflop_s": 4 * rows * n * k / us[0] / 1e6})
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no_check", action="store_true")
    parser.add_argument("--no_timing", action="store_true")
    parser.add_argument("--seconds", type=float, default=600, help="no timing begins after these")
    parser.add_argument("--json", help="file for the timings")
    options = parser.parse_args()
    load_library()
    # The trainer's two settings: every one of its linear layers is then the ascending-k chain.
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.manual_seed(0)
    differing = 0
    if not options.no_check:
        for name in SHAPES:
            differing += check(name, ROWS, TRAINER_ROWS)
        for name in LONG_SHAPES:
            differing += check(name, LONG_ROWS, max(LONG_ROWS))
        for name in SWIGLU_SHAPES:
            differing += check_swiglu(name, ROWS, TRAINER_ROWS)
        print("all bits equal" if differing == 0 else f"{differing} differ")
    if not options.no_timing:
        results = measure_swiglu() + measure(options.seconds)
        path = options.json or (os.path.join(os.environ["JOB_OUT"], "linear.json") if "JOB_OUT" in os.environ else None)
        if path:
            pathlib.Path(path).write_text(json.dumps({"device": torch.cuda.get_device_name(), "kernels": results}, indent=1))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
