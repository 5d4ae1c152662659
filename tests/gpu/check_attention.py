#!/usr/bin/env python3
"""Attention, its paged cache and rotary embedding beside PyTorch's and transformers' own, bit for bit, with timings.

Needs a Hopper GPU, torch and transformers. The library is liblockstep_cuda.so, or $LOCKSTEP_CUDA_LIBRARY. Ends with 1 if any bit differs.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import pathlib
import random
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

D = 128
SCALE = D**-0.5
POISON_PAGE = 0x3FFFFFFF
# Number, PyTorch's backend, and whether it is given a mask (as transformers does in sliding layers from `window` tokens on, and with padding).
PROGRAMS = {
    "cudnn": (0, SDPBackend.CUDNN_ATTENTION, False),
    "fa2": (1, SDPBackend.FLASH_ATTENTION, False),
    "cudnn_mask": (2, SDPBackend.CUDNN_ATTENTION, True),
}
DEVICE = "cuda"

lib = None


def load_library():
    global lib
    path = os.environ.get("LOCKSTEP_CUDA_LIBRARY", "liblockstep_cuda.so")
    lib = ctypes.CDLL(str(pathlib.Path(path).resolve()) if os.path.exists(path) else path)
    lib.lockstep_last_error.restype = ctypes.c_char_p
    lib.lockstep_attention_workspace_bytes.restype = ctypes.c_int64


def call(name, *args):
    types = {int: ctypes.c_int64, float: ctypes.c_float}
    converted = []
    for a in args:
        if a is None or isinstance(a, torch.Tensor):
            converted.append(ctypes.c_void_p(0 if a is None else a.data_ptr()))
        elif isinstance(a, (ctypes.c_int32, ctypes.c_void_p)):
            converted.append(a)
        else:
            converted.append(types[type(a)](a))
    converted.append(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if getattr(lib, name)(*converted) != 0:
        raise RuntimeError(f"{name}: {lib.lockstep_last_error().decode()}")


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def bits(t):
    return t.contiguous().view(torch.int16)


@dataclasses.dataclass
class Piece:
    sequence: int
    position: int
    count: int


class Batch:
    """What one step's DeviceBatch holds: decode pieces (one row each) first, then prefill pieces cut into tiles."""

    def __init__(self, cache, decode, prefill):
        pieces, tiles, pages, positions, row_piece = [], [], [], [], []
        self.pieces = decode + prefill
        row = 0
        for index, piece in enumerate(self.pieces):
            used = (piece.position + piece.count + cache.page_size - 1) // cache.page_size
            pieces.append([row, piece.count, piece.position, 0, len(pages), 0])
            pages += cache.tables[piece.sequence][:used] + [POISON_PAGE] * 3
            positions += range(piece.position, piece.position + piece.count)
            row_piece += [index] * piece.count
            if index >= len(decode):
                done = 0
                while done < piece.count:
                    position = piece.position + done
                    count = min(piece.count - done, 64 - position % 64)
                    tiles.append([index, row + done, count, position])
                    done += count
            row += piece.count
        if tiles:
            tiles += [[0, 0, 0, 0]] * 2  # padding
        self.rows = row
        self.decode = len(decode)
        self.tile_count = len(tiles)
        self.device = [int32(x) if x else None for x in (pieces, tiles, pages, positions, row_piece)]

    def gather(self, per_sequence):
        return torch.cat([per_sequence[p.sequence][p.position : p.position + p.count] for p in self.pieces])


class Cache:
    """Pages of every sequence in random order; what is not written is NaN."""

    def __init__(self, lengths, kv_heads, page_size, extra_bytes=0):
        self.page_size, self.kv_heads = page_size, kv_heads
        counts = [(n + page_size - 1) // page_size for n in lengths]
        self.page_count = sum(counts) + 1
        self.page_bytes = 4 * kv_heads * page_size * D + extra_bytes
        self.data = torch.full((self.page_count * self.page_bytes // 2,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        order = list(range(self.page_count))
        random.shuffle(order)
        self.tables = []
        for n in counts:
            self.tables.append(order[:n])
            order = order[n:]

    def geometry(self):
        return self.data, self.page_count, self.page_bytes, self.page_size, self.kv_heads

    def write(self, batch, k, v):
        pieces, _, pages, positions, row_piece = batch.device
        call("lockstep_write_kv", pieces, pages, positions, row_piece, ctypes.c_int32(batch.rows), k, v, k.stride(0), v.stride(0), *self.geometry())


def attention(program, cache, batch, q, heads, window=0, workspace=None, out=None):
    pieces, tiles, pages, _, _ = batch.device
    out = torch.full_like(q, float("nan")) if out is None else out
    call(
        "lockstep_attention",
        ctypes.c_int32(PROGRAMS[program][0]),
        pieces,
        tiles,
        pages,
        ctypes.c_int32(len(batch.pieces)),
        ctypes.c_int32(batch.decode),
        ctypes.c_int32(batch.tile_count),
        q,
        out,
        q.stride(0),
        out.stride(0),
        *cache.geometry(),
        heads,
        window,
        SCALE,
        workspace,
        0 if workspace is None else workspace.numel(),
        max(p.position for p in batch.pieces) + 1,
    )
    return out


class Report:
    def __init__(self):
        self.failed = 0
        self.checks, self.kernels = [], []

    def compare(self, name, got, want):
        different = bits(got) != bits(want)
        count = int(different.sum())
        self.checks.append({"name": name, "elements": want.numel(), "differing": count})
        line = f"{'ok  ' if count == 0 else 'DIFF'} {name}: {count} of {want.numel()}"
        if count:
            self.failed += 1
            rows = different.flatten(1).any(1).nonzero().flatten()
            at = tuple(int(x[0]) for x in different.nonzero(as_tuple=True))
            line += f"; {len(rows)} rows, {rows[:6].tolist()} .. {rows[-1].item()}; first at {at}: {got[at].item()} want {want[at].item()}"
        print(line, flush=True)


def reference(program, q, k, v, window=0):
    """SDPA over one sequence, q [T, heads, D]. Repeated in the batch, or flash splits the keys of a short one."""
    _, backend, masked = PROGRAMS[program]
    heads, length = q.shape[1], q.shape[0]
    repeat = 1
    if backend == SDPBackend.FLASH_ATTENTION:
        repeat = max(1, -(-256 // (heads * ((length + 63) // 64))))
    group = heads // k.shape[1]
    x = [t.repeat_interleave(n, 1).transpose(0, 1)[None].repeat(repeat, 1, 1, 1) for t, n in ((q, 1), (k, group), (v, group))]
    kwargs = {"is_causal": True}
    if masked:
        i = torch.arange(length, device=DEVICE)
        mask = i[None, :] <= i[:, None]
        if window:
            mask &= i[None, :] > i[:, None] - window
        kwargs = {"attn_mask": mask[None, None]}
    else:
        assert window == 0
    # PyTorch's cuDNN backend refuses one key and leaves it to another: any gives the value itself.
    with sdpa_kernel(backend if length > 1 else [backend, SDPBackend.MATH]):
        return torch.nn.functional.scaled_dot_product_attention(*x, **kwargs)[0].transpose(0, 1).contiguous()


def random_qkv(length, heads, kv_heads, spread=1.0):
    q = torch.randn(length, heads, D, device=DEVICE) * spread
    return q.bfloat16(), torch.randn(length, kv_heads, D, device=DEVICE).bfloat16(), torch.randn(length, kv_heads, D, device=DEVICE).bfloat16()


def flat(t):
    return t.reshape(t.shape[0], -1)


def cut(length, sequence, most):
    pieces, position = [], 0
    while position < length:
        count = min(random.randint(1, most), length - position)
        pieces.append(Piece(sequence, position, count))
        position += count
    return pieces


def with_workspace(heads, kv_heads, decode, positions):
    size = lib.lockstep_attention_workspace_bytes(*(ctypes.c_int64(x) for x in (decode, heads, kv_heads, positions)))
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE) if size else None


def check_sequence(report, length, heads, kv_heads, page_size, spread=1.0, window=0, programs=tuple(PROGRAMS)):
    """One sequence: prefill in one piece, and sampled rows by both ways of decoding."""
    name = f"T {length} heads {heads}/{kv_heads} page {page_size}" + (f" window {window}" if window else "")
    q, k, v = random_qkv(length, heads, kv_heads, spread)
    cache = Cache([length], kv_heads, page_size, extra_bytes=512)
    whole = Batch(cache, [], [Piece(0, 0, length)])
    # k and v as columns of a wider row, as a fused projection leaves them
    fused = torch.cat([flat(k), flat(v), torch.full((length, 8), float("nan"), dtype=torch.bfloat16, device=DEVICE)], 1)
    cache.write(whole, fused[:, : kv_heads * D], fused[:, kv_heads * D : 2 * kv_heads * D])
    samples = {t for t in (0, 1, 15, 16, 63, 64, 65, 127, 128, 129, 191, 192, length // 2, length - 2, length - 1) if 0 <= t < length}
    samples = sorted(samples | set(random.sample(range(length), min(length, 40))))
    for program in programs:
        want = flat(reference(program, q, k, v, window))
        report.compare(f"{program} prefill {name}", attention(program, cache, whole, flat(q), heads, window), want)
        decode = Batch(cache, [Piece(0, t, 1) for t in samples], [])
        report.compare(f"{program} decode {name}", attention(program, cache, decode, decode.gather([flat(q)]), heads, window), want[samples])
        workspace = with_workspace(heads, kv_heads, 1, length)
        if workspace is None:
            continue
        got = []
        for t in samples[::8] + [length - 1]:
            one = Batch(cache, [Piece(0, t, 1)], [])
            got.append(attention(program, cache, one, one.gather([flat(q)]), heads, window, workspace=workspace))
        report.compare(f"{program} spread decode {name}", torch.cat(got), want[samples[::8] + [length - 1]])


def check_mixed(report, lengths, heads, kv_heads, page_size):
    """A batch of decode rows and pieces of several sequences, run step after step into the same cache."""
    name = f"mixed {lengths} heads {heads}/{kv_heads} page {page_size}"
    data = [random_qkv(n, heads, kv_heads) for n in lengths]
    for program in PROGRAMS:
        want = [flat(reference(program, *x)) for x in data]
        cache = Cache(lengths, kv_heads, page_size)
        todo = [cut(n, s, 200 if s % 2 else 700) for s, n in enumerate(lengths)]
        got = [torch.full_like(w, float("nan")) for w in want]
        while any(todo):
            # some sequences advance by a piece, and by single rows where the piece is one row
            now = [t.pop(0) for t in todo if t and random.random() < 0.8]
            batch = Batch(cache, [p for p in now if p.count == 1], [p for p in now if p.count > 1])
            if not now:
                continue
            cache.write(batch, batch.gather([flat(x[1]) for x in data]), batch.gather([flat(x[2]) for x in data]))
            out = attention(program, cache, batch, batch.gather([flat(x[0]) for x in data]), heads)
            row = 0
            for p in batch.pieces:
                got[p.sequence][p.position : p.position + p.count] = out[row : row + p.count]
                row += p.count
        report.compare(f"{program} {name}", torch.cat(got), torch.cat(want))


def timed(function, repeats=10):
    for _ in range(2):
        function()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats * 1e3  # us


def bench_decode(report, sequences, context, heads, program="cudnn"):
    lengths = [context] * sequences
    cache = Cache(lengths, heads, 64)
    cache.data.normal_()
    batch = Batch(cache, [Piece(s, context - 1, 1) for s in range(sequences)], [])
    q = torch.randn(sequences, heads * D, device=DEVICE).bfloat16()
    workspace = with_workspace(heads, heads, sequences, context)
    out = torch.empty_like(q)
    us = timed(lambda: attention(program, cache, batch, q, heads, workspace=workspace, out=out))
    plain = timed(lambda: attention(program, cache, batch, q, heads, out=out)) if workspace is not None else us
    moved = sequences * context * heads * D * 4
    view = cache.data[: 2 * sequences * heads * context * D].view(2, sequences, heads, context, D)
    query = q.view(sequences, heads, 1, D)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        peer = timed(lambda: torch.nn.functional.scaled_dot_product_attention(query, view[0], view[1]))
    print(
        f"decode {program} {sequences} x {context}: {us:.1f} us {moved / us * 1e-6:.2f} TB/s (one block a head: {plain:.1f} us {moved / plain * 1e-6:.2f}); "
        f"cuDNN {peer:.1f} us {moved / peer * 1e-6:.2f} TB/s; {peer / us:.3f}",
        flush=True,
    )
    report.kernels.append(
        {"name": "attention decode", "shape": f"{sequences} x {context}", "program": program, "us": us, "peer": "cudnn", "peer_us": peer, "ratio": peer / us, "bytes": moved, "tb_s": moved / us * 1e-6}
    )


def bench_prefill(report, context, heads, program="cudnn"):
    cache = Cache([context], heads, 64)
    cache.data.normal_()
    batch = Batch(cache, [], [Piece(0, 0, context)])
    q = torch.randn(context, heads * D, device=DEVICE).bfloat16()
    out = torch.empty_like(q)
    us = timed(lambda: attention(program, cache, batch, q, heads, out=out))
    flop = 2.0 * context * context * heads * D  # the causal half
    view = cache.data[: 2 * heads * context * D].view(2, 1, heads, context, D)
    query = q.view(1, heads, context, D)
    with sdpa_kernel(PROGRAMS[program][1]):
        peer = timed(lambda: torch.nn.functional.scaled_dot_product_attention(query, view[0], view[1], is_causal=True))
    print(f"prefill {program} {context}: {us:.1f} us {flop / us * 1e-6:.0f} TFLOP/s; peer {peer:.1f} us {flop / peer * 1e-6:.0f} TFLOP/s; {peer / us:.3f}", flush=True)
    report.kernels.append(
        {"name": "attention prefill", "shape": f"1 x {context}", "program": program, "us": us, "peer": program, "peer_us": peer, "ratio": peer / us, "tflop_s": flop / us * 1e-6}
    )


def check_rope(report, heads, kv_heads, rope):
    """`rope`: what transformers calls rope_parameters, of all layers."""
    from transformers import Olmo3Config, OlmoHybridConfig
    from transformers.models.olmo3 import modeling_olmo3
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid

    for label, module, config in (
        ("olmo3", modeling_olmo3, Olmo3Config(hidden_size=heads * D, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=4, rope_parameters={"full_attention": rope, "sliding_attention": rope})),
        ("olmo_hybrid", modeling_olmo_hybrid, OlmoHybridConfig(hidden_size=heads * D, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=4, rope_parameters=dict(rope))),
    ):
        if label == "olmo3":
            rotary = module.Olmo3RotaryEmbedding(config).to(DEVICE)
            arguments, inv_freq, scaling = ("full_attention",), rotary.full_attention_inv_freq, rotary.full_attention_attention_scaling
        else:
            rotary = module.OlmoHybridRotaryEmbedding(config).to(DEVICE)
            arguments, inv_freq, scaling = (), rotary.inv_freq, rotary.attention_scaling
        rows = 65536
        positions = torch.arange(rows, device=DEVICE)
        q = torch.randn(rows, heads * D, device=DEVICE).bfloat16()
        k = torch.randn(rows, kv_heads * D, device=DEVICE).bfloat16()
        cos, sin = rotary(q, positions[None], *arguments)
        split = lambda t: t.view(1, rows, -1, D).transpose(1, 2)
        want = module.apply_rotary_pos_emb(split(q), split(k), cos, sin)
        wide = torch.cat([q, k], 1)
        call("lockstep_rope", positions.int(), torch.zeros_like(positions).int(), ctypes.c_int32(rows), wide, wide[:, heads * D :], inv_freq.float().contiguous(), heads, kv_heads, wide.stride(0), wide.stride(0), float(scaling))
        for name, got, w in (("q", wide[:, : heads * D], want[0]), ("k", wide[:, heads * D :], want[1])):
            report.compare(f"rope {label} {rope['rope_type']} {name}, positions 0 .. {rows - 1}", got, flat(w[0].transpose(0, 1)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=os.path.join(os.environ.get("JOB_OUT", "."), "attention.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1, 2, 63, 64, 65, 127, 128, 129, 200, 512, 1030, 2048, 4096, 8192])
    parser.add_argument("--no-bench", action="store_true")
    args = parser.parse_args()
    load_library()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    report = Report()
    for i, length in enumerate(args.lengths):
        check_sequence(report, length, 30, 30, 64 if i % 2 else 128)
    check_sequence(report, 1030, 32, 8, 64, spread=4.0)
    check_sequence(report, 700, 24, 2, 192)
    for length, window in ((1030, 512), (1030, 300), (700, 1), (6000, 4096)):
        check_sequence(report, length, 8, 8, 64, window=window, programs=("cudnn_mask",))
    check_mixed(report, [1500, 1, 513, 64, 900], 6, 6, 64)
    check_mixed(report, [700, 257], 16, 2, 128)
    check_rope(report, 8, 2, {"rope_theta": 500000.0, "rope_type": "default"})
    yarn = {"rope_theta": 500000.0, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
    check_rope(report, 8, 8, yarn)
    if not args.no_bench:
        for sequences, context in ((32, 8192), (8, 32768), (1, 32768), (128, 1024), (2, 32768), (4, 32768)):
            bench_decode(report, sequences, context, 30)
        for context in (8192, 32768):
            bench_prefill(report, context, 30)
        bench_prefill(report, 8192, 30, "fa2")
    device = {"device": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}}
    pathlib.Path(args.output).write_text(json.dumps(device | {"checks": report.checks, "kernels": report.kernels}, indent=1) + "\n")
    print(f"{len(report.checks)} comparisons, {report.failed} with differences")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
