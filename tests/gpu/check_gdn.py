#!/usr/bin/env python3
"""Gated DeltaNet's chunk program beside flash-linear-attention's, bit for bit, with timings.

Needs a Hopper GPU, torch and flash-linear-attention. The library is liblockstep_cuda.so, or $LOCKSTEP_CUDA_LIBRARY. Ends with 1 if any bit differs.
"""

import argparse
import ctypes
import dataclasses
import importlib
import json
import os
import pathlib
import random
import sys
import time

import numpy as np
import torch
from fla.modules.l2norm import l2norm_fwd
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

DK, DV, CHUNK = 96, 192, 64
CONV_WIDTH = 4
PARTS = ("conv_tail", "state_f32", "image", "k_rows", "bv_rows", "vp_rows", "solve", "scalars", "bytes")
DEVICE = "cuda"

failures = []
lib = None
tuned = True  # fla's kernels, by its own search


def load_library():
    global lib
    path = os.environ.get("LOCKSTEP_CUDA_LIBRARY", "liblockstep_cuda.so")
    lib = ctypes.CDLL(str(pathlib.Path(path).resolve()) if os.path.exists(path) else path)
    i32, i64, ptr = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    lib.lockstep_last_error.restype = ctypes.c_char_p
    lib.lockstep_gdn_state_layout.argtypes = [i32, i32, i32, ptr]
    lib.lockstep_gdn_state_element.argtypes = [i32, i32]
    lib.lockstep_gdn_state_element.restype = i64
    lib.lockstep_gdn_prefill_workspace_bytes.argtypes = [i64, i64]
    lib.lockstep_gdn_prefill_workspace_bytes.restype = i64
    common = [ptr, ptr, ptr, ptr, i32, i32, i32, ptr, i64, ptr, i32, i32]
    lib.lockstep_gdn_decode.argtypes = common + [ptr]
    lib.lockstep_gdn_prefill.argtypes = common + [ptr, i32, ptr, i64, ptr]


def check(code):
    if code != 0:
        raise RuntimeError(lib.lockstep_last_error().decode())


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def compare(name, got, want, quiet=False):
    """Counts elements whose bits differ; the first of them goes into the report."""
    got, want = got.contiguous(), want.contiguous()
    if got.shape != want.shape or got.dtype != want.dtype:
        failures.append(name)
        print(f"FAIL {name}: {got.dtype}{tuple(got.shape)} against {want.dtype}{tuple(want.shape)}")
        return False
    integer = {2: torch.int16, 4: torch.int32, 1: torch.uint8}[got.element_size()]
    different = got.view(integer) != want.view(integer)
    count = int(different.sum())
    if count == 0:
        if not quiet:
            print(f"ok   {name}: {got.numel()} equal")
        return True
    index = tuple(int(x) for x in different.nonzero()[0])
    failures.append(name)
    print(f"FAIL {name}: {count} of {got.numel()} differ; first at {index}: {got[index].item()!r}, want {want[index].item()!r}")
    return False


@dataclasses.dataclass
class Inputs:
    """One sequence: raw and normalised q and k, and the buffer of a layer's convolution, q | k | v."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor
    qkv: torch.Tensor

    @property
    def rows(self):
        return self.qkv.shape[0]


def make_inputs(rows, key_heads, value_heads, seed):
    gen = torch.Generator(device=DEVICE).manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, device=DEVICE, generator=gen)
    q = randn(1, rows, key_heads, DK).bfloat16()
    k = randn(1, rows, key_heads, DK).bfloat16()
    # Neighbouring keys alike in some stretches, as text has them: A's entries are then far from zero.
    k = torch.where((torch.arange(rows, device=DEVICE) // 40 % 2 == 1)[None, :, None, None], (0.7 * k[:, :1] + 0.3 * k).bfloat16(), k)
    v = randn(1, rows, value_heads, DV).bfloat16()
    beta = randn(1, rows, value_heads).bfloat16().sigmoid() * 2
    g = -torch.nn.functional.softplus(randn(1, rows, value_heads)) * torch.rand(1, 1, value_heads, device=DEVICE, generator=gen) * 0.5
    norm = lambda x: l2norm_fwd(x.reshape(-1, DK))[0].reshape(rows, -1)
    qkv = torch.cat([norm(q), norm(k), v.reshape(rows, -1)], dim=1).contiguous()
    return Inputs(q, k, v, beta, g, qkv)


def fla(x, n, state=None, begin=0):
    s = slice(begin, n)
    o, final = chunk_gated_delta_rule(
        x.q[:, s], x.k[:, s], x.v[:, s], g=x.g[:, s], beta=x.beta[:, s], initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    return o[0].reshape(n - begin, -1), final[0]


class Layer:
    """One layer's state slots, all bytes poisoned, and the two kernels."""

    def __init__(self, key_heads, value_heads, slots, workspace_tiles=80):
        self.key_heads, self.value_heads = key_heads, value_heads
        offsets = (ctypes.c_int64 * 9)()
        lib.lockstep_gdn_state_layout(key_heads, value_heads, CONV_WIDTH, offsets)
        self.layout = dict(zip(PARTS, offsets))
        self.state = torch.full((slots, self.layout["bytes"]), 0xFF, dtype=torch.uint8, device=DEVICE)
        size = lib.lockstep_gdn_prefill_workspace_bytes(value_heads, workspace_tiles)
        self.workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE)

    def common(self, qkv, beta, g, out, pieces, piece_count, decode_pieces):
        return (qkv.data_ptr(), beta.data_ptr(), g.data_ptr(), out.data_ptr(), self.key_heads, self.value_heads, CONV_WIDTH, self.state.data_ptr(),
                self.state.shape[1], pieces.data_ptr(), piece_count, decode_pieces)

    def decode(self, qkv, beta, g, out, pieces, piece_count, decode_pieces):
        check(lib.lockstep_gdn_decode(*self.common(qkv, beta, g, out, pieces, piece_count, decode_pieces), torch.cuda.current_stream().cuda_stream))

    def prefill(self, qkv, beta, g, out, pieces, piece_count, decode_pieces, tiles):
        check(lib.lockstep_gdn_prefill(*self.common(qkv, beta, g, out, pieces, piece_count, decode_pieces), tiles.data_ptr(), tiles.shape[0],
                                       self.workspace.data_ptr(), self.workspace.numel(), torch.cuda.current_stream().cuda_stream))

    def part(self, slot, name, kind, shape):
        count = int(np.prod(shape)) * torch.empty(0, dtype=kind).element_size()
        begin = self.layout[name]
        return self.state[slot, begin : begin + count].view(kind).reshape(shape)

    def state_matrix(self, slot):
        """S as fla has it, [value_heads, 96, 192]."""
        return self.part(slot, "state_f32", torch.float32, (self.value_heads, DK * DV))[:, STATE_ORDER].reshape(-1, DK, DV)

    def image_matrix(self, slot):
        return self.part(slot, "image", torch.bfloat16, (self.value_heads, DK * DV))[:, IMAGE_ORDER].reshape(-1, DK, DV)

    def what_matters(self, slot, position):
        """Every part of the slot that the next position may read."""
        parts = {}
        heads, t = self.value_heads, position % CHUNK
        if position >= CHUNK:
            parts["S"] = self.part(slot, "state_f32", torch.int32, (heads, DK * DV))
            parts["image"] = self.part(slot, "image", torch.int16, (heads, DK * DV))
        parts["k"] = self.part(slot, "k_rows", torch.int16, (heads, CHUNK, DK))[:, :t]
        parts["bv"] = self.part(slot, "bv_rows", torch.int16, (heads, CHUNK, DV))[:, :t]
        parts["vp"] = self.part(slot, "vp_rows", torch.int16, (heads, CHUNK, DV))[:, :t]
        parts["scalars"] = self.part(slot, "scalars", torch.int32, (heads, 3, CHUNK))[:, :, :t]
        solve = self.part(slot, "solve", torch.int32, (heads, 13, 16, 16))
        r, i = divmod(t, 16)
        parts["solve, finished rows"] = solve[:, : r * (r + 1) // 2]
        if i > 0:
            base = r * (r + 1) // 2
            parts["solve, diagonal"] = solve[:, base, :i]
            parts["solve, row"] = solve[:, base + 1 : base + 1 + r, :i]
            if r > 0:
                parts["solve, A"] = solve[:, 10, :i]
            if r > 1:
                parts["solve, inner"] = solve[:, 11 : 11 + r - 1, :i]
        return {name: part.clone() for name, part in parts.items()}


def state_orders():
    f32 = np.array([lib.lockstep_gdn_state_element(dk, dv) for dk in range(DK) for dv in range(DV)])
    image = np.empty_like(f32)
    for dk in range(DK):
        for dv in range(DV):
            lane = dv % 8 * 4 + dk % 8 // 2
            register = dk % 16 // 8 * 2 + dv % 16 // 8
            image[dk * DV + dv] = (((dv // 16) * 6 + dk // 16) * 32 + lane) * 8 + register * 2 + dk % 2
    return torch.from_numpy(f32).to(DEVICE), torch.from_numpy(image).to(DEVICE)


def tiles_of(piece_index, row_begin, rows, position):
    tiles = []
    while rows > 0:
        count = min(rows, CHUNK - position % CHUNK)
        tiles.append([piece_index, row_begin, count, position])
        row_begin, rows, position = row_begin + count, rows - count, position + count
    return tiles


def run_step(layer, work):
    """work: [(inputs, out, slot, position, rows, decode)]; decode pieces first. Adds one padding piece and tile."""
    work = sorted(work, key=lambda w: not w[5])
    decodes = sum(w[5] for w in work)
    pieces, tiles, row = [], [], 0
    for index, (_, _, slot, position, rows, decode) in enumerate(work):
        pieces.append([row, rows, position, slot, 0, 0])
        if not decode:
            tiles += tiles_of(index, row, rows, position)
        row += rows
    if decodes < len(work):
        pieces.append([0, 0, 0, 0, 0, 0])
        tiles.append([0, 0, 0, 0])
    rows_of = lambda get: torch.cat([get(x)[p : p + n] for x, _, _, p, n, _ in work]).contiguous()
    qkv, beta, g = rows_of(lambda x: x.qkv), rows_of(lambda x: x.beta[0]), rows_of(lambda x: x.g[0])
    out = torch.full((row, layer.value_heads * DV), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    pieces = int32(pieces)
    if decodes:
        layer.decode(qkv, beta, g, out, pieces, pieces.shape[0], decodes)
    if tiles:
        layer.prefill(qkv, beta, g, out, pieces, pieces.shape[0], decodes, int32(tiles))
    row = 0
    for _, target, _, position, rows, _ in work:
        target[position : position + rows] = out[row : row + rows]
        row += rows


def decode_all(layer, sequences):
    """sequences: [(inputs, out, slot, begin, end)], every row by decode; all of them together, each until its end."""
    for position in range(min(s[3] for s in sequences), max(s[4] for s in sequences)):
        run_step(layer, [(x, out, slot, position, 1, True) for x, out, slot, begin, end in sequences if begin <= position < end])


def empty_out(x, heads):
    return torch.full((x.rows, heads * DV), float("nan"), dtype=torch.bfloat16, device=DEVICE)


def compare_states(name, got, want):
    ok = True
    for part in want:
        ok &= compare(f"{name}: {part}", got[part], want[part], quiet=True)
    return ok


def check_lengths(key_heads, value_heads, lengths, decode_limit, rng):
    tag = f"{key_heads}/{value_heads} heads"
    x = make_inputs(max(lengths), key_heads, value_heads, seed=key_heads * 100 + value_heads)
    reference, _ = fla(x, x.rows)
    for n in lengths:
        name = f"{tag}, {n} rows"
        want, _ = fla(x, n)
        compare(f"{name}: fla's own prefix", want, reference[:n], quiet=True)
        final = fla(x, n // CHUNK * CHUNK)[1] if n >= CHUNK else None
        layer = Layer(key_heads, value_heads, slots=4)
        outs = [empty_out(x, value_heads) for _ in range(4)]
        ways = {"prefill": 0, "prefill in pieces": 1}
        run_step(layer, [(x, outs[0], 0, 0, n, False)])
        position = 0
        while position < n:
            rows = min(n - position, rng.choice((1, rng.randint(1, 20), rng.randint(1, 100), rng.randint(1, 700))))
            run_step(layer, [(x, outs[1], 1, position, rows, False)])
            position += rows
        if n <= decode_limit:
            decode_all(layer, [(x, outs[2], 2, 0, n)])
            ways["decode"] = 2
        narrow = Layer(key_heads, value_heads, slots=1, workspace_tiles=3)
        run_step(narrow, [(x, outs[3], 0, 0, n, False)])
        compare(f"{name}, prefill in a small workspace: o", outs[3][:n], want, quiet=True)
        compare_states(f"{name}, prefill in a small workspace", narrow.what_matters(0, n), layer.what_matters(0, n))
        states = {}
        for way, slot in ways.items():
            compare(f"{name}, {way}: o", outs[slot][:n], want)
            if final is not None:
                compare(f"{name}, {way}: S", layer.state_matrix(slot), final)
                compare(f"{name}, {way}: image", layer.image_matrix(slot), final.bfloat16(), quiet=True)
            states[way] = layer.what_matters(slot, n)
        for way in list(ways)[1:]:
            compare_states(f"{name}, {way} against prefill", states[way], states["prefill"])


def check_mixed(key_heads, value_heads, rng, rounds):
    """Sequences that start at different steps, each step a random mix of decode and prefill pieces, one slot each."""
    for number in range(rounds):
        lengths = [rng.choice((rng.randint(1, 70), rng.randint(60, 400))) for _ in range(7)]
        inputs = [make_inputs(n, key_heads, value_heads, seed=1000 * number + s) for s, n in enumerate(lengths)]
        layer = Layer(key_heads, value_heads, slots=len(lengths), workspace_tiles=rng.choice((2, 80)))
        outs = [empty_out(x, value_heads) for x in inputs]
        slots = rng.sample(range(len(lengths)), len(lengths))
        position = [0] * len(lengths)
        while any(p < n for p, n in zip(position, lengths)):
            work = []
            for s, x in enumerate(inputs):
                left = lengths[s] - position[s]
                if left == 0 or rng.random() < 0.2:
                    continue
                decode = rng.random() < 0.6
                rows = 1 if decode else min(left, rng.choice((1, rng.randint(1, 30), rng.randint(1, 150))))
                work.append((x, outs[s], slots[s], position[s], rows, decode))
                position[s] += rows
            if work:
                run_step(layer, work)
        for s, x in enumerate(inputs):
            name = f"{key_heads}/{value_heads} heads, mixed batch {number}, sequence {s} of {lengths[s]}"
            compare(f"{name}: o", outs[s], fla(x, lengths[s])[0], quiet=True)
            if lengths[s] >= CHUNK:
                compare(f"{name}: S", layer.state_matrix(slots[s]), fla(x, lengths[s] // CHUNK * CHUNK)[1], quiet=True)
            alone = Layer(key_heads, value_heads, slots=1)
            run_step(alone, [(x, empty_out(x, value_heads), 0, 0, lengths[s], False)])
            compare_states(name, layer.what_matters(slots[s], lengths[s]), alone.what_matters(0, lengths[s]))
    print(f"mixed batches {key_heads}/{value_heads}: {rounds} done")


def check_intermediates(key_heads, value_heads):
    """T, G and v' of the second chunk's 63 rows, and u and w of the first chunk as prefill's workspace has them."""
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    n = 2 * CHUNK - 1
    x = make_inputs(n, key_heads, value_heads, seed=5)
    kn = x.qkv[:, key_heads * DK : 2 * key_heads * DK].reshape(1, n, key_heads, DK).contiguous()
    scan = chunk_local_cumsum(x.g, chunk_size=CHUNK, scale=RCP_LN2)
    w, u, a = chunk_gated_delta_rule_fwd_intra(k=kn, v=x.v, g=scan, beta=x.beta)
    _, v_new, _ = chunk_gated_delta_rule_fwd_h(k=kn, w=w, u=u, g=scan, output_final_state=True)
    t = n - CHUNK
    for way in ("prefill", "decode"):
        layer = Layer(key_heads, value_heads, slots=1, workspace_tiles=2)
        out = empty_out(x, value_heads)
        if way == "prefill":
            run_step(layer, [(x, out, 0, 0, n, False)])
        else:
            decode_all(layer, [(x, out, 0, 0, n)])
        scalars = layer.part(0, "scalars", torch.float32, (value_heads, 3, CHUNK))
        compare(f"intermediates, {way}: G", scalars[:, 1, :t], scan[0, CHUNK:].T)
        solve = layer.part(0, "solve", torch.float32, (value_heads, 13, 16, 16))
        row, column = torch.meshgrid(torch.arange(16, device=DEVICE), torch.arange(16, device=DEVICE), indexing="ij")
        solve = solve[:, :, row, column ^ ((row & 2) << 2)]
        inverse = torch.zeros(value_heads, CHUNK, CHUNK, device=DEVICE)
        for r in range(4):
            for c in range(r + 1):
                block = r * (r + 1) // 2 + (0 if c == r else 1 + c)
                inverse[:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] = solve[:, block]
        want = a[0, CHUNK:].transpose(0, 1)
        for r in range(4):
            for c in range(r + 1):
                rows, columns = slice(16 * r, min(16 * r + 16, t)), slice(16 * c, 16 * c + 16)
                compare(f"intermediates, {way}: T block {r}{c}", inverse[:, rows, columns].bfloat16() + 0.0, want[:, rows, columns] + 0.0, quiet=True)
        vp = layer.part(0, "vp_rows", torch.bfloat16, (value_heads, CHUNK, DV))[:, :t]
        chunks = torch.arange(DV // 8, device=DEVICE)[None, :] ^ (torch.arange(t, device=DEVICE) & 7)[:, None]
        vp = vp.reshape(value_heads, t, DV // 8, 8)[:, torch.arange(t, device=DEVICE)[:, None], chunks].reshape(value_heads, t, DV)
        compare(f"intermediates, {way}: v'", vp, v_new[0, CHUNK:].transpose(0, 1))
        if way == "prefill":
            record = layer.workspace.numel() // 2 // value_heads
            first = layer.workspace.reshape(2, value_heads, record)[0]
            got_u = first[:, : 2 * CHUNK * DV].contiguous().view(torch.bfloat16).reshape(value_heads, 12, 4, 8, 4, 2, 2, 2)  # tile, block, g, c, half, below, e
            got_u = got_u.permute(0, 2, 5, 4, 7, 1, 6, 3).reshape(value_heads, CHUNK, DV)
            compare("intermediates, prefill: u", got_u, u[0, :CHUNK].transpose(0, 1))
            got_w = first[:, 2 * CHUNK * DV : 2 * CHUNK * (DV + DK)].contiguous().view(torch.bfloat16)
            got_w = got_w.reshape(value_heads, 6, 4, 8, 4, 2, 2, 2)  # step, block, g, c, below, half, e
            got_w = got_w.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(value_heads, CHUNK, DK)
            compare("intermediates, prefill: w", got_w, w[0, :CHUNK].transpose(0, 1))


def graph_time(body, repeats=3):
    """Milliseconds of `body` in a CUDA graph, the best of `repeats` replays after one to warm up."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    graph.replay()
    best = float("inf")
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best


def decode_bytes(t, heads):
    r, i = divmod(t, 16)
    size = 2 * DK * DV + 960 * t + 1024 * (r * (r + 1) // 2) + 64 * i * (1 + r) + 768 + 768 + 384 + 384 + 960 + 12 + 64 * (1 + 2 * r)
    if t == CHUNK - 1:
        size += 8 * DK * DV + 2 * 2 * DK * DV + 64 * 15 * 3
    return size * heads


def decode_setup(batch, heads, seed=3):
    x = make_inputs(max(batch, 256), heads, heads, seed)
    layer = Layer(heads, heads, slots=batch, workspace_tiles=1)
    layer.state.random_(0, 50)  # finite in every type
    out = torch.empty(batch, heads * DV, dtype=torch.bfloat16, device=DEVICE)
    return x, layer, out


def decode_pieces_at(batch, ts):
    return int32([[b, 1, 6400 + t, b, 0, 0] for b, t in enumerate(ts)])


def time_decode(results, peers, heads=30):
    for batch in (1, 32, 128, 256):
        x, layer, out = decode_setup(batch, heads)
        step = lambda pieces: layer.decode(x.qkv, x.beta, x.g, out, pieces, batch, batch)
        row = {"batch": batch, "kernel": "gdn_decode"}
        mixed = [[(b * 37 + 11 + s) % 64 for b in range(batch)] for s in range(64)]
        pieces = [decode_pieces_at(batch, ts) for ts in mixed]
        row["mixed_t_us"] = graph_time(lambda: [step(p) for p in pieces]) / 64 * 1e3
        row["bytes"] = sum(decode_bytes(t, heads) for ts in mixed for t in ts) / 64
        row["tb_s"] = row["bytes"] / row["mixed_t_us"] / 1e6
        if not peers:
            print(f"decode batch {batch}: {row['mixed_t_us']:.1f} us mean over mixed t ({row['tb_s']:.2f} TB/s)", flush=True)
            continue
        phase = {}
        for t in (0, 15, 16, 31, 47, 62, 63):
            same = decode_pieces_at(batch, [t] * batch)
            phase[t] = graph_time(lambda: [step(same) for _ in range(8)]) / 8 * 1e3
        row["in_phase_us"] = phase
        q, k, v = (t[0, :batch].unsqueeze(1).contiguous() for t in (x.q, x.k, x.v))
        beta, g = x.beta[0, :batch].unsqueeze(1).contiguous(), x.g[0, :batch].unsqueeze(1).contiguous()
        state = torch.randn(batch, heads, DK, DV, device=DEVICE)
        peer = lambda: [fused_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True) for _ in range(8)]
        row["fla_fused_recurrent_us"] = graph_time(peer) / 8 * 1e3
        results.append(row)
        print(f"decode batch {batch}: {row['mixed_t_us']:.1f} us mean over mixed t ({row['tb_s']:.2f} TB/s), fla fused recurrent {row['fla_fused_recurrent_us']:.1f}; "
              f"in phase {', '.join(f't={t} {us:.1f}' for t, us in phase.items())}", flush=True)


def time_prefill(results, peers, heads=30, shapes=((1, 8192), (1, 65536), (4, 2048), (16, 512), (1, 1024), (1, 512))):
    from triton.testing import do_bench

    for sequences, length in shapes:
        total = sequences * length
        step_rows = min(total, 8192)
        x = make_inputs(min(total, 65536), heads, heads, seed=9)
        layer = Layer(heads, heads, slots=sequences, workspace_tiles=step_rows // CHUNK)
        out = torch.empty(x.rows, heads * DV, dtype=torch.bfloat16, device=DEVICE)
        steps = []
        for begin in range(0, total, step_rows):
            if sequences == 1:
                steps.append((begin, int32([[0, step_rows, begin, 0, 0, 0]]), int32(tiles_of(0, 0, step_rows, begin))))
            else:
                steps.append((0, int32([[s * length, length, 0, s, 0, 0] for s in range(sequences)]),
                              int32([t for s in range(sequences) for t in tiles_of(s, s * length, length, 0)])))

        def body():
            for begin, pieces, tiles in steps:
                layer.prefill(x.qkv[begin:], x.beta[0, begin:], x.g[0, begin:], out[begin:], pieces, pieces.shape[0], 0, tiles)

        ms = graph_time(body)
        if not peers or sequences > 1:
            results.append({"kernel": "gdn_prefill", "sequences": sequences, "length": length, "us_per_token": ms * 1e3 / total})
            print(f"prefill {sequences} x {length}: {ms * 1e3 / total:.4f} us a token", flush=True)
            continue
        peer = lambda: chunk_gated_delta_rule(x.q, x.k, x.v, g=x.g, beta=x.beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
        peer()
        peer_ms = do_bench(peer, warmup=20, rep=60, return_mode="median")
        results.append({"kernel": "gdn_prefill", "sequences": sequences, "length": length, "us_per_token": ms * 1e3 / total, "fla_us_per_token": peer_ms * 1e3 / total, "fla_tuned": tuned})
        print(f"prefill {sequences} x {length}: {ms * 1e3 / total:.4f} us a token, fla chunk {peer_ms * 1e3 / total:.4f} "
              f"(with its l2norm; {'autotuned' if tuned else 'not autotuned: --timings alone tunes it'})", flush=True)


def use_first_configurations():
    """fla's autotuning costs minutes and does not show in the bits."""
    global tuned
    tuned = False
    modules = ("fla.ops.gated_delta_rule.chunk_fwd", "fla.ops.gated_delta_rule.wy_fast", "fla.ops.common.chunk_delta_h", "fla.ops.common.chunk_o",
               "fla.modules.l2norm", "fla.ops.utils.cumsum")
    for module in map(importlib.import_module, modules):
        for name in dir(module):
            kernel = getattr(module, name)
            for _ in range(4):
                if hasattr(kernel, "configs"):
                    kernel.configs = kernel.configs[:1]
                    break
                kernel = getattr(kernel, "fn", None)


def main():
    global STATE_ORDER, IMAGE_ORDER
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", action="store_true", help="compare bits only")
    parser.add_argument("--timings", action="store_true", help="time only")
    parser.add_argument("--one_decode", type=int, metavar="T", help="a few decode launches at row T, batch 64, for a profiler")
    parser.add_argument("--no_peers", action="store_true", help="time this project's kernels only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where the timings go")
    args = parser.parse_args()
    load_library()
    STATE_ORDER, IMAGE_ORDER = state_orders()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if args.one_decode is not None:
        x, layer, out = decode_setup(64, 30)
        pieces = decode_pieces_at(64, [args.one_decode] * 64)
        for _ in range(3):
            layer.decode(x.qkv, x.beta, x.g, out, pieces, 64, 64)
        torch.cuda.synchronize()
        print("counted bytes", decode_bytes(args.one_decode, 30) * 64)
        return 0
    results = []
    if not args.timings:
        use_first_configurations()
        rng = random.Random(args.seed)
        started = time.time()
        for key_heads, value_heads, lengths, limit in (
            (30, 30, (1, 15, 16, 17, 63, 64, 65, 128, 300, 1000, 4096), 1000),
            (2, 4, (1, 33, 65, 300), 300),
        ):
            check_intermediates(key_heads, value_heads)
            check_lengths(key_heads, value_heads, lengths, limit, rng)
            print(f"lengths {key_heads}/{value_heads} done after {time.time() - started:.0f} s", flush=True)
            check_mixed(key_heads, value_heads, rng, rounds=3)
        print(f"bits: {len(failures)} comparisons failed, {time.time() - started:.0f} s", flush=True)
    if not args.bits:
        time_decode(results, not args.no_peers)
        time_prefill(results, not args.no_peers)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": results}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
