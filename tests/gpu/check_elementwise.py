"""The CUDA row-wise operations beside transformers', PyTorch's and flash-linear-attention's own, bit for bit.

Needs a Hopper GPU, torch, transformers, fla and liblockstep_cuda.so, at LOCKSTEP_CUDA_LIBRARY or where the loader finds
it. Exit code 1 if any bit differs. Writes elementwise.json to $JOB_OUT if that is set: what was compared, and times
beside the peers'.
"""

import argparse
import ctypes
import json
import os
import pathlib
import random
import sys
import time

import fla
import torch
import torch.nn.functional as F
import transformers
from fla.modules import fused_norm_gate, l2norm
from fla.modules.conv import causal_conv1d
from fla.modules.conv.triton.kernels import causal_conv1d_fwd_kernel
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as olmo

DEVICE = "cuda"
EPS = 1e-6
POISON = -1  # as int16 a NaN that no operation writes

SIGNATURES = {  # p: pointer, l: int64, i: int32, f: float; the stream comes last
    "add": "pplllli",
    "embedding": "pppllllii",
    "gather_rows": "pppllllli",
    "round_rows": "ppllll",
    "swiglu": "ppllll",
    "rms_norm": "ppppllllfii",
    "rms_norm_pair": "ppllpplllf",
    "rms_norm_residual": "ipppppllfi",
    "gated_rms_norm": "ppppllllllfi",
    "gdn_gates": "pppppplllllli",
    "gdn_conv": "ppppllllllippiiii",
}
CTYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}


class Lockstep:
    """The C functions, called with tensors as pointers, on torch's current stream."""

    def __init__(self):
        path = os.environ.get("LOCKSTEP_CUDA_LIBRARY", "liblockstep_cuda.so")
        self._library = ctypes.CDLL(str(pathlib.Path(path).resolve()) if os.path.exists(path) else path)
        self._library.lockstep_last_error.restype = ctypes.c_char_p
        for name, signature in SIGNATURES.items():
            getattr(self._library, "lockstep_" + name).argtypes = [CTYPES[c] for c in signature] + [ctypes.c_void_p]

    def __getattr__(self, name):
        function = getattr(self._library, "lockstep_" + name)

        def call(*arguments):
            values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            if function(*values, torch.cuda.current_stream().cuda_stream) != 0:
                raise RuntimeError(self._library.lockstep_last_error().decode())

        return call


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def poisoned(*shape, dtype=torch.bfloat16):
    element = torch.int16 if dtype == torch.bfloat16 else torch.int32
    return torch.full(shape, POISON, device=DEVICE, dtype=element).view(dtype)


def normal(*shape, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16()


def every_bf16():
    return torch.arange(65536, dtype=torch.int32, device=DEVICE).to(torch.int16).view(torch.bfloat16)


class Report:
    def __init__(self):
        self.comparisons = []
        self.timings = []

    def same(self, name, ours, theirs):
        a, b = bits(ours), bits(theirs.to(ours.device))
        if a.shape != b.shape:
            raise ValueError(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
        differing = (a != b).nonzero()
        entry = {"name": name, "compared": a.numel(), "differing": len(differing)}
        if len(differing):
            where = tuple(differing[0].tolist())
            entry["first"] = {"index": where, "ours": ours[where].item(), "theirs": theirs[where].item()}
        self.comparisons.append(entry)
        print(f"{'  ' if not len(differing) else '! '}{name}: {len(differing)} of {a.numel()} differ",
              entry.get("first", ""), flush=True)

    @property
    def failed(self):
        return [entry["name"] for entry in self.comparisons if entry["differing"]]


# Batches as kernels/cuda/batch.h has them.


def make_batch(pieces, decode):
    """pieces: (row_count, position, slot), the first `decode` of one row each; returns the arguments of gdn_conv."""
    piece_rows, tiles, row = [], [], 0
    for index, (count, position, slot) in enumerate(pieces):
        piece_rows.append((row, count, position, slot, 0, 0))
        done = 0
        while index >= decode and done < count:
            rows = min(count - done, 64 - (position + done) % 64)
            tiles.append((index, row + done, rows, position + done))
            done += rows
        row += count
    array = lambda values, width: torch.tensor(values or [(0,) * width], dtype=torch.int32, device=DEVICE)
    return array(piece_rows, 6), array(tiles, 4), row, len(pieces), decode, len(tiles)


def random_schedule(lengths, generator):
    """Steps that bring every sequence to its length: (sequence, rows, position) pieces, how many of them decode."""
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths)):
        step = []
        for sequence, n in enumerate(lengths):
            if done[sequence] == n or generator.random() < 0.3:
                continue
            rows = 1 if generator.random() < 0.5 else generator.choice((2, 3, 4, 5, 17, 63, 64, 65, 130, 400))
            step.append((sequence, min(rows, n - done[sequence])))
        step.sort(key=lambda item: item[1] != 1)
        if step:
            decode = generator.randint(0, sum(rows == 1 for _, rows in step))  # the others are prefill of one row
            yield [(sequence, rows, done[sequence]) for sequence, rows in step], decode
            for sequence, rows in step:
                done[sequence] += rows


class ConvState:
    """Convolution tails in slots as in a worker's memory: wider than the tail, poisoned."""

    def __init__(self, channels, slots):
        self.stride = 3 * channels * 2 + 256
        self.memory = torch.full((slots, self.stride // 2), POISON, dtype=torch.int16, device=DEVICE)


def convolve(lockstep, x, weight, state, shape, pieces, decode=0, one_cast=False):
    key_heads, key_dim, value_width = shape
    channels = 2 * key_heads * key_dim + value_width
    out = poisoned(x.shape[0], channels)
    piece_array, tile_array, rows, piece_count, decode, tile_count = make_batch(pieces, decode)
    assert rows == x.shape[0]
    lockstep.gdn_conv(x, weight, out, state.memory, state.stride, x.stride(0), channels, key_heads, key_dim,
                      value_width, int(one_cast), piece_array, tile_array, rows, piece_count, decode, tile_count)
    torch.cuda.synchronize()  # the arrays above are freed here
    return out


def fix_config(autotuned, index):
    """One of fla's autotuning configurations, which agree in bits: compiling all of them takes a minute."""
    autotuned.configs = autotuned.configs[index:index + 1]


def normalise_heads(y, shape):
    """fla's l2norm of the q and k columns of y [rows, channels]."""
    key_heads, key_dim, _ = shape
    keys = 2 * key_heads * key_dim
    normalised, _ = l2norm.l2norm_fwd(y[:, :keys].contiguous().view(-1, key_dim))
    return torch.cat([normalised.view(y.shape[0], keys), y[:, keys:]], -1)


def module_conv(x, weight):
    """The stock module's convolution of one sequence x [rows, channels], with its layout."""
    return olmo.causal_conv1d_fn(x[None].transpose(1, 2), weight=weight, bias=None,
                                 activation="silu")[0].transpose(0, 1).contiguous()


def check_conv_shape(lockstep, report, shape, lengths):
    generator = random.Random(0)
    channels = 2 * shape[0] * shape[1] + shape[2]
    weight = normal(channels, 4, scale=0.4)
    inputs = [normal(n, channels + 64)[:, :channels] for n in lengths]
    want = torch.cat([module_conv(x, weight) for x in inputs])
    want = normalise_heads(want, shape)
    state = ConvState(channels, len(lengths))
    one_piece = [convolve(lockstep, x, weight, state, shape, [(len(x), 0, i)]) for i, x in enumerate(inputs)]
    report.same(f"conv+silu+l2norm {shape} in one piece", torch.cat(one_piece), want)
    state = ConvState(channels, len(lengths))
    got = [poisoned(n, channels) for n in lengths]
    for step, decode in random_schedule(lengths, generator):
        x = torch.cat([inputs[s][p:p + rows] for s, rows, p in step])
        out = convolve(lockstep, x, weight, state, shape, [(rows, p, s) for s, rows, p in step], decode)
        row = 0
        for s, rows, p in step:
            got[s][p:p + rows] = out[row:row + rows]
            row += rows
    report.same(f"conv+silu+l2norm {shape} in random pieces", torch.cat(got), want)
    outside = state.memory[:, 3 * channels:]
    report.same(f"conv {shape}: bytes past the tails", outside, torch.full_like(outside, POISON))


def check_conv(lockstep, report):
    shape = (30, 96, 5760)
    check_conv_shape(lockstep, report, shape, [1, 2, 3, 5, 64, 130, 300, 580])
    weight = normal(11520, 4, scale=0.4)
    x = normal(8192, 11520)
    for rows in (8192, 1000):
        got = convolve(lockstep, x[:rows], weight, ConvState(11520, 1), shape, [(rows, 0, 0)])
        report.same(f"conv+silu+l2norm, {rows} rows", got, normalise_heads(module_conv(x[:rows], weight), shape))
    got = convolve(lockstep, x[:1000], weight, ConvState(11520, 1), shape, [(1000, 0, 0)], one_cast=True)
    y, _ = causal_conv1d(x[None, :1000], weight, activation="silu")
    report.same("conv with one rounding, fla's", got, normalise_heads(y[0], shape))


def check_head_sizes(lockstep, report):
    for shape in ((2, 96, 384), (3, 32, 96), (2, 64, 128), (2, 128, 256), (1, 192, 64), (1, 256, 8)):
        check_conv_shape(lockstep, report, shape, [1, 3, 66, 200])


def check_gates(lockstep, report):
    every = every_bf16()
    heads = 32
    a_log = torch.empty(heads, device=DEVICE).uniform_(1e-3, 16).log()
    dt_bias = torch.randn(heads, device=DEVICE) * 3
    for name, a, b in (("every bf16", every.view(-1, heads), every.view(-1, heads)),
                       ("random", normal(777, heads, scale=4), normal(777, heads, scale=4))):
        both = torch.cat([a, b], -1)  # as columns of one projection
        rows = len(a)
        for neg_eigval in (False, True):
            beta, g = poisoned(rows, heads), poisoned(rows, heads, dtype=torch.float32)
            lockstep.gdn_gates(both, both[:, heads:], a_log, dt_bias, beta, g, rows, heads, 2 * heads, 2 * heads,
                               heads, heads, int(neg_eigval))
            want = b.sigmoid() * 2.0 if neg_eigval else b.sigmoid()
            report.same(f"beta, {name}, neg_eigval {neg_eigval}", beta, want)
        report.same(f"g, {name}", g, -a_log.float().exp() * F.softplus(a.float() + dt_bias))


def check_module(lockstep, report):
    """One layer of the stock model: its own forward, with what goes into and comes out of its parts."""
    config = transformers.OlmoHybridConfig(num_hidden_layers=4, hidden_size=3840, intermediate_size=11008,
                                           num_attention_heads=30, num_key_value_heads=30, vocab_size=128,
                                           linear_num_key_heads=30, linear_num_value_heads=30,
                                           linear_key_head_dim=96, linear_value_head_dim=192)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        module = olmo.OlmoHybridGatedDeltaNet(config, layer_idx=0)
    torch.set_default_dtype(torch.float32)
    module = module.to(torch.bfloat16)
    module.conv1d.weight.data = normal(*module.conv1d.weight.shape, scale=0.4)
    module.o_norm.weight.data = 1 + normal(192, scale=0.2)
    seen = {}
    hooks = [getattr(module, name).register_forward_hook(lambda m, i, o, n=name: seen.__setitem__(n, (i, o)))
             for name in ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_norm")]
    core = olmo.torch_chunk_gated_delta_rule

    def recording(q, k, v, **arguments):
        seen["core"] = (q, k, v, arguments["g"], arguments["beta"])
        return normal(*v.shape), None  # the chunk program itself is not compared here

    olmo.torch_chunk_gated_delta_rule = recording
    with torch.no_grad():
        module(normal(1, 300, 3840))
    olmo.torch_chunk_gated_delta_rule = core
    for hook in hooks:
        hook.remove()
    rows = 300
    out_of = lambda name: seen[name][1][0] if seen[name][1].dim() == 3 else seen[name][1]
    mixed = torch.cat([out_of("q_proj"), out_of("k_proj"), out_of("v_proj")], -1)
    q, k, v, g, beta = (t[0] for t in seen["core"])
    shape = (30, 96, 5760)
    want = normalise_heads(torch.cat([t.reshape(rows, -1) for t in (q, k, v)], -1), shape)
    report.same("the module's q, k, v", convolve(lockstep, mixed, module.conv1d.weight.squeeze(1).contiguous(),
                                                 ConvState(11520, 1), shape, [(rows, 0, 0)]), want)
    our_beta, our_g = poisoned(rows, 30), poisoned(rows, 30, dtype=torch.float32)
    lockstep.gdn_gates(out_of("a_proj"), out_of("b_proj"), module.A_log.float(), module.dt_bias.float(), our_beta,
                       our_g, rows, 30, 30, 30, 30, 30, int(module.allow_neg_eigval))
    report.same("the module's beta", our_beta, beta)
    report.same("the module's g", our_g, g)
    (x, gate), y = seen["o_norm"]
    ours = poisoned(rows, 5760)
    lockstep.gated_rms_norm(x, gate, module.o_norm.weight, ours, rows, 30, 192, 5760, 5760, 5760,
                            module.o_norm.variance_epsilon, 0)
    report.same(f"the module's gated norm ({type(module.o_norm).__module__}.{type(module.o_norm).__name__})", ours,
                y.reshape(rows, 5760))


def fla_gated_norm(x, gate, weight, head_dim, eps):
    return fused_norm_gate.rms_norm_gated(x.view(-1, head_dim), gate.reshape(-1, head_dim), weight, None,
                                          activation="swish", eps=eps).view(x.shape)


def check_gated_norm(lockstep, report):
    for head_dim in (128, 192, 256):
        rows, heads, eps = 1111, 30, 1e-5
        width = heads * head_dim
        projection = normal(rows, 2 * width + 64, scale=3)
        x, gate, weight = normal(rows, width, scale=2), projection[:, width:2 * width], 1 + normal(head_dim, scale=0.2)
        module = olmo.OlmoHybridRMSNormGated(head_dim, eps=eps).to(DEVICE)
        module.weight.data = weight
        with torch.no_grad():
            want = module(x.view(-1, head_dim), gate.reshape(-1, head_dim)).view(rows, width)
        out = poisoned(rows, width)
        lockstep.gated_rms_norm(x, gate, weight, out, rows, heads, head_dim, width, gate.stride(0), width, eps, 0)
        report.same(f"gated norm {head_dim}, the module's three roundings", out, want)
        in_place = x.clone()
        lockstep.gated_rms_norm(in_place, gate, weight, in_place, rows, heads, head_dim, width, gate.stride(0), width,
                                eps, 0)
        report.same(f"gated norm {head_dim}, in place", in_place, want)
        for count in (1, 2, 7):
            few = poisoned(count, width)
            lockstep.gated_rms_norm(x, gate, weight, few, count, heads, head_dim, width, gate.stride(0), width, eps, 0)
            report.same(f"gated norm {head_dim}, {count} rows", few, want[:count])
        want = fla_gated_norm(x, gate, weight, head_dim, eps)
        out = poisoned(rows, width)
        lockstep.gated_rms_norm(x, gate, weight, out, rows, heads, head_dim, width, gate.stride(0), width, eps, 1)
        report.same(f"gated norm {head_dim}, fla's one rounding", out, want)
    # Every gate beside 45 values of x: silu alone is fp32, so its last bits show in few products.
    gate = every_bf16().repeat(45).view(512, 5760)
    x, weight = normal(512, 5760, scale=2), 1 + normal(192, scale=0.2)
    module = olmo.OlmoHybridRMSNormGated(192, eps=1e-5).to(DEVICE)
    module.weight.data = weight
    with torch.no_grad():
        want = module(x.view(-1, 192), gate.view(-1, 192)).view(512, 5760)
    out = poisoned(512, 5760)
    lockstep.gated_rms_norm(x, gate, weight, out, 512, 30, 192, 5760, 5760, 5760, 1e-5, 0)
    report.same("gated norm 192, every bf16 gate", out, want)


def norm_module(width, weight):
    module = olmo.OlmoHybridRMSNorm(width, eps=EPS).to(DEVICE)
    module.weight.data = weight
    return module


@torch.no_grad()
def check_norms(lockstep, report):
    for width in (128, 192, 256, 3840, 4096):
        weight = 1 + normal(width, scale=0.2)
        module = norm_module(width, weight)
        x = normal(8192, width, scale=2)
        want = module(x)
        for rows in (8192, 300, 17, 16, 9, 1):
            out = poisoned(rows, width)
            lockstep.rms_norm(x, None, weight, out, rows, width, width, width, EPS, 0, 0)
            report.same(f"norm {width}, {rows} rows", out, want[:rows])
        report.same(f"the module's own norm {width}, 300 rows of 8192", module(x[:300]), want[:300])
        indices = torch.randperm(8192, device=DEVICE)[:97].to(torch.int32)
        out = poisoned(97, width)
        lockstep.rms_norm(x, indices, weight, out, 97, width, width, width, EPS, 0, 0)
        report.same(f"norm {width} of gathered rows", out, want[indices.long()])
    for q_width, k_width in ((3840, 3840), (4096, 1024)):
        width = q_width + 2 * k_width
        fused = normal(333, width)
        weights = [1 + normal(w, scale=0.2) for w in (q_width, k_width)]
        want = torch.cat([norm_module(q_width, weights[0])(fused[:, :q_width]),
                          norm_module(k_width, weights[1])(fused[:, q_width:q_width + k_width]),
                          fused[:, q_width + k_width:]], -1)
        lockstep.rms_norm_pair(fused, weights[0], q_width, width, fused[:, q_width:], weights[1], k_width, width, 333,
                               EPS)
        report.same(f"q and k norm {q_width}, {k_width} in place", fused, want)
    for width in (256, 3840, 4096):
        rows = 520
        x, residual = normal(rows, width), normal(rows, width)
        weight, out_weight = 1 + normal(width, scale=0.2), 1 + normal(width, scale=0.2)
        module, out_module = norm_module(width, weight), norm_module(width, out_weight)
        got, out = residual.clone(), poisoned(rows, width)
        lockstep.rms_norm_residual(1, x, weight, None, got, out, rows, width, EPS, 0)
        report.same(f"add, then norm {width}: residual", got, residual + x)
        report.same(f"add, then norm {width}", out, module(residual + x))
        got = residual.clone()
        lockstep.rms_norm_residual(2, x, weight, None, got, None, rows, width, EPS, 0)
        report.same(f"norm {width}, then add", got, residual + module(x))
        got, out = residual.clone(), poisoned(rows, width)
        lockstep.rms_norm_residual(3, x, weight, out_weight, got, out, rows, width, EPS, 0)
        report.same(f"norm {width}, add, norm: residual", got, residual + module(x))
        report.same(f"norm {width}, add, norm", out, out_module(residual + module(x)))
        got = residual.clone()
        lockstep.add(x, got, rows, width, width, width, 0)
        report.same(f"add {width}", got, residual + x)


@torch.no_grad()
def check_autocast(lockstep, report):
    """fp32 weights and residual stream under autocast, each operation as the stock modules run it."""
    floats = lambda *shape, scale=1.0: torch.randn(*shape, device=DEVICE) * scale
    as_linear_reads = lambda y: y.bfloat16()  # what autocast makes of a linear layer's fp32 input
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for width in (256, 3840, 4096):
            rows = 520
            weight = 1 + floats(width, scale=0.2)
            module = norm_module(width, weight)
            x, residual = normal(rows, width), floats(rows, width, scale=5)
            for name, value in (("bf16", x), ("fp32", residual)):
                out = poisoned(rows, width)
                lockstep.rms_norm(value, None, weight, out, rows, width, width, width, EPS, int(name == "fp32"), 1)
                report.same(f"autocast: norm {width} of {name}, fp32 weight", out, as_linear_reads(module(value)))
            got, out = residual.clone(), poisoned(rows, width)
            lockstep.rms_norm_residual(1, x, weight, None, got, out, rows, width, EPS, 1)
            report.same(f"autocast: add, then norm {width}: residual", got, residual + x)
            report.same(f"autocast: add, then norm {width}", out, as_linear_reads(module(residual + x)))
            got = residual.clone()
            lockstep.rms_norm_residual(2, x, weight, None, got, None, rows, width, EPS, 1)
            report.same(f"autocast: norm {width}, then add", got, residual + module(x))
            got = residual.clone()
            lockstep.add(x, got, rows, width, width, width, 1)
            report.same(f"autocast: add {width}", got, residual + x)
            out = poisoned(rows, width)
            lockstep.round_rows(residual, out, rows, width, width, width)
            report.same(f"autocast: rounded rows {width}", out, residual.bfloat16())
        table = floats(1000, 3840)
        tokens = torch.randint(0, 1000, (77,), dtype=torch.int32, device=DEVICE)
        for name, source in (("fp32", table), ("bf16", table.bfloat16())):
            out = poisoned(77, 3840, dtype=torch.float32)
            lockstep.embedding(tokens, source, out, 77, 1000, 3840, 3840, int(name == "fp32"), 1)
            report.same(f"autocast: embedding, {name} table", out, F.embedding(tokens, source.float()))
        out = poisoned(77, 3840, dtype=torch.float32)
        lockstep.gather_rows(tokens, table, out, 77, 1000, 3840, 3840, 3840, 1)
        report.same("autocast: gathered rows", out, table[tokens.long()])
        for head_dim in (128, 192, 256):
            rows, heads, eps = 1111, 30, 1e-5
            width = heads * head_dim
            x, gate, weight = normal(rows, width, scale=2), normal(rows, width, scale=3), 1 + floats(head_dim, scale=0.2)
            module = olmo.OlmoHybridRMSNormGated(head_dim, eps=eps).to(DEVICE)
            module.weight.data = weight
            want = module(x.view(-1, head_dim), gate.view(-1, head_dim)).view(rows, width)
            out = poisoned(rows, width)
            lockstep.gated_rms_norm(x, gate, weight, out, rows, heads, head_dim, width, width, width, eps, 2)
            report.same(f"autocast: gated norm {head_dim}, two roundings", out, want)
        conv_weight = floats(11520, 4, scale=0.4)
        x = normal(1000, 11520)
        shape = (30, 96, 5760)
        got = convolve(lockstep, x, conv_weight.bfloat16(), ConvState(11520, 1), shape, [(1000, 0, 0)])
        report.same("autocast: conv+silu+l2norm", got, normalise_heads(module_conv(x, conv_weight), shape))


def check_swiglu(lockstep, report):
    every = every_bf16().view(64, 1024)
    silu = olmo.ACT2FN["silu"]
    for name, gate, up in (("every bf16 gate, up 1", every, torch.ones_like(every)),
                           ("every bf16 gate", every, normal(64, 1024)),
                           ("random", normal(700, 11008, scale=3), normal(700, 11008))):
        rows, width = gate.shape
        out = poisoned(rows, width)
        lockstep.swiglu(torch.cat([gate, up], -1), out, rows, width, 2 * width, width)
        report.same(f"swiglu, {name}", out, silu(gate) * up)


def check_rows(lockstep, report):
    table = normal(1000, 3840)
    tokens = torch.randint(0, 1000, (77,), dtype=torch.int32, device=DEVICE)
    out = poisoned(77, 3840)
    lockstep.embedding(tokens, table, out, 77, 1000, 3840, 3840, 0, 0)
    report.same("embedding", out, F.embedding(tokens, table))
    out = poisoned(77, 3840)
    lockstep.gather_rows(tokens, table, out, 77, 1000, 3840, 3840, 3840, 0)
    report.same("gathered rows", out, table[tokens.long()])


# Times: launches in a CUDA graph, so neither Python nor the launch itself is in them.


def microseconds(work, launches):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                work(i)
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1000 / launches)
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def measure(lockstep, report):
    print(f"{'':34}{'rows':>6}{'us':>9}{'TB/s':>7}{'peer us':>9}")
    for rows in (1, 32, 128, 8192):
        launches = 12 if rows == 8192 else 60
        sets = 3 if rows == 8192 else 1  # past the L2 cache, as a forward pass finds it at 8192 rows

        def line(name, per_row_bytes, ours, peer):
            us = microseconds(ours, launches)
            peer_us = microseconds(peer, launches) if peer is not None else None
            tb_s = rows * per_row_bytes / us / 1e6
            report.timings.append({"name": name, "rows": rows, "us": us, "bytes": rows * per_row_bytes, "tb_s": tb_s,
                                   "peer_us": peer_us})
            print(f"{name:34}{rows:6}{us:9.2f}{tb_s:7.2f}" + (f"{peer_us:9.2f}" if peer_us else ""), flush=True)

        width = 3840
        x = [normal(rows, width) for _ in range(sets)]
        residual = [normal(rows, width) for _ in range(sets)]
        out = [poisoned(rows, width) for _ in range(sets)]
        weight = 1 + normal(width, scale=0.2)
        module = norm_module(width, weight)
        line("norm", 4 * width, lambda i: lockstep.rms_norm(x[i % sets], None, weight, out[i % sets], rows, width,
                                                            width, width, EPS, 0, 0), lambda i: module(x[i % sets]))
        line("add, norm", 8 * width,
             lambda i: lockstep.rms_norm_residual(1, x[i % sets], weight, None, residual[i % sets], out[i % sets],
                                                  rows, width, EPS, 0),
             lambda i: module(x[i % sets] + residual[i % sets]))
        line("norm, add", 6 * width,
             lambda i: lockstep.rms_norm_residual(2, x[i % sets], weight, None, residual[i % sets], None, rows, width,
                                                  EPS, 0), lambda i: module(x[i % sets]) + residual[i % sets])
        line("norm, add, norm", 8 * width,
             lambda i: lockstep.rms_norm_residual(3, x[i % sets], weight, weight, residual[i % sets], out[i % sets],
                                                  rows, width, EPS, 0),
             lambda i: module(module(x[i % sets]) + residual[i % sets]))
        line("add", 6 * width, lambda i: lockstep.add(x[i % sets], residual[i % sets], rows, width, width, width, 0),
             lambda i: residual[i % sets].add_(x[i % sets]))
        qkv = [normal(rows, 3 * width) for _ in range(sets)]
        line("q and k norm", 8 * width,
             lambda i: lockstep.rms_norm_pair(qkv[i % sets], weight, width, 3 * width, qkv[i % sets][:, width:],
                                              weight, width, 3 * width, rows, EPS),
             lambda i: (module(qkv[i % sets][:, :width]), module(qkv[i % sets][:, width:2 * width])))
        del qkv, x, residual, out
        inner = 11008
        gate_up = [normal(rows, 2 * inner) for _ in range(sets)]
        act = [poisoned(rows, inner) for _ in range(sets)]
        line("swiglu", 6 * inner, lambda i: lockstep.swiglu(gate_up[i % sets], act[i % sets], rows, inner, 2 * inner,
                                                            inner),
             lambda i: F.silu(gate_up[i % sets][:, :inner]) * gate_up[i % sets][:, inner:])
        del gate_up, act
        x, gate = normal(rows, 5760), normal(rows, 17408)[:, 11520:17280]
        norm_out, head_weight = poisoned(rows, 5760), 1 + normal(192, scale=0.2)
        gated = olmo.OlmoHybridRMSNormGated(192, eps=1e-5).to(DEVICE)
        gated.weight.data = head_weight
        peers = {0: lambda i: gated(x.view(-1, 192), gate.reshape(-1, 192)),
                 1: lambda i: fla_gated_norm(x, gate, head_weight, 192, 1e-5)}
        for one_cast in (0, 1):
            line("gated norm" + ", fla's" * one_cast, 6 * 5760,
                 lambda i: lockstep.gated_rms_norm(x, gate, head_weight, norm_out, rows, 30, 192, 5760, 17408, 5760,
                                                   1e-5, one_cast), peers[one_cast])
        del x, gate, norm_out
        gates = normal(rows, 64)
        a_log, dt_bias = torch.zeros(30, device=DEVICE), torch.zeros(30, device=DEVICE)
        beta, g = poisoned(rows, 30), poisoned(rows, 30, dtype=torch.float32)
        line("gates", 10 * 30, lambda i: lockstep.gdn_gates(gates, gates[:, 30:], a_log, dt_bias, beta, g, rows, 30, 64,
                                                            64, 30, 30, 1),
             lambda i: (gates[:, 30:60].sigmoid() * 2.0,
                        -a_log.exp() * F.softplus(gates[:, :30].float() + dt_bias)))
        shape, channels = (30, 96, 5760), 11520
        conv_weight = normal(channels, 4, scale=0.4)
        conv_in = [normal(rows, 17408)[:, :channels] for _ in range(sets)]
        conv_out = [poisoned(rows, channels) for _ in range(sets)]
        states = [ConvState(channels, min(rows, 128)) for _ in range(sets)]
        for name, pieces in (("decode", [(1, 1000 + i, i) for i in range(rows)]), ("prefill", [(rows, 0, 0)])):
            if (name == "decode") == (rows > 128) or (name == "prefill" and rows == 1):
                continue
            piece_array, tile_array, *counts = make_batch(pieces, rows if name == "decode" else 0)
            line(f"conv+silu+l2norm, {name}", (12 if name == "decode" else 4) * channels,
                 lambda i: lockstep.gdn_conv(conv_in[i % sets], conv_weight, conv_out[i % sets],
                                             states[i % sets].memory, states[i % sets].stride, 17408, channels, *shape,
                                             0, piece_array, tile_array, *counts),
                 (lambda i: normalise_heads(module_conv(conv_in[i % sets], conv_weight), shape))
                 if name == "prefill" else None)
        del conv_in, conv_out, states


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no_timing", action="store_true", help="bits only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.backends.cuda.preferred_blas_library("cublaslt")
    lockstep = Lockstep()
    report = Report()
    fix_config(l2norm.l2norm_fwd_kernel, 13)  # 64 rows, 4 warps
    fix_config(fused_norm_gate.layer_norm_gated_fwd_kernel.fn, 0)  # 16 rows, 4 warps
    fix_config(causal_conv1d_fwd_kernel.fn, 8)  # 64 channels, 4 warps
    for check in (check_conv, check_module, check_gated_norm, check_gates, check_swiglu, check_norms, check_autocast, check_rows):
        begin = time.monotonic()
        check(lockstep, report)
        print(f"{check.__name__}: {time.monotonic() - begin:.1f} s")
        torch.cuda.empty_cache()
    check_head_sizes(lockstep, report)
    if not options.no_timing:
        measure(lockstep, report)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "fla": fla.__version__,
                "device": torch.cuda.get_device_name()}
    if folder := os.environ.get("JOB_OUT"):
        with open(os.path.join(folder, "elementwise.json"), "w", encoding="utf-8") as file:
            json.dump({"versions": versions, "comparisons": report.comparisons, "timings": report.timings}, file,
                      indent=1)
    compared = sum(entry["compared"] for entry in report.comparisons)
    print(f"{len(report.comparisons)} comparisons, {compared} values, differing in: {report.failed or 'none'}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
