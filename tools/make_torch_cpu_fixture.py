"""Writes tests/data/torch_cpu: inputs and outputs of PyTorch's and transformers' own CPU code in bf16, which
kernels/cpu/torch_cpu_test.cc compares with in bits. Needs an AMD CPU with AVX512-BF16 (oneDNN has other orders without,
oneMKL's triangular solve has others on Intel's), and was run with PyTorch 2.13.0 (CPU) and transformers 5.17.0:

    .venv/bin/python tools/make_torch_cpu_fixture.py
"""

import pathlib

import torch
import torch.nn.functional as F
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as modeling

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "torch_cpu"


def write(name, tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        (OUT / f"{name}.bf16").write_bytes(tensor.view(torch.int16).numpy().tobytes())
    else:
        (OUT / f"{name}.f32").write_bytes(tensor.float().numpy().tobytes())


def random(generator, *shape, scale=1.0):
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def linear(generator):
    for k in (97, 600, 1100):
        x, weight = random(generator, 3, k), random(generator, 7, k)
        write(f"linear{k}_x", x)
        write(f"linear{k}_w", weight)
        write(f"linear{k}_y", F.linear(x[None], weight)[0])


def norm(generator):
    for width in (40, 200, 1000):
        module = modeling.OlmoHybridRMSNorm(width)
        module.weight.copy_(1 + 0.2 * torch.randn(width, generator=generator))
        module = module.bfloat16()
        x = random(generator, 4, width, scale=3.0)
        write(f"norm{width}_x", x)
        write(f"norm{width}_w", module.weight)
        write(f"norm{width}_y", module(x[None])[0])


def attention(generator):
    """576 rows: two tiles, four chains."""
    q, k, v = (random(generator, 1, 1, 576, 16) for _ in range(3))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        write(f"attention_{name}", tensor[0, 0])
    write("attention_y", F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)[0, 0])


def gated_delta_rule(generator):
    """130 rows, two key heads, two value heads, d_k 24 and d_v 40; once without decay, where every e^x is 1."""
    rows, heads, key_dim, value_dim = 130, 2, 24, 40
    q, k = (random(generator, 1, rows, heads, key_dim) for _ in range(2))
    v = random(generator, 1, rows, heads, value_dim)
    beta = (2 * torch.rand(1, rows, heads, generator=generator)).bfloat16()
    decaying = -0.3 * torch.rand(1, rows, heads, generator=generator)
    write("gdn_qkv", torch.cat([x[0].flatten(1) for x in (q, k, v)], -1))
    write("gdn_beta", beta[0])
    for name, g in (("still", torch.zeros_like(decaying)), ("decaying", decaying)):
        y, _ = modeling.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        write(f"gdn_{name}_g", g[0])
        write(f"gdn_{name}_y", y[0].flatten(1))


def gates(generator):
    """Sixteen heads: whole vectors, as PyTorch's last elements of an array go through the C library instead."""
    a, b = (random(generator, 64, 16, scale=4.0) for _ in range(2))
    a_log, dt_bias = random(generator, 16), random(generator, 16)
    for name, tensor in (("a", a), ("b", b), ("a_log", a_log), ("dt_bias", dt_bias)):
        write(f"gates_{name}", tensor)
    write("gates_beta", b.sigmoid() * 2.0)
    write("gates_g", -a_log.float().exp() * F.softplus(a.float() + dt_bias))


@torch.no_grad()
def main():
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    if "AuthenticAMD" not in flags or "avx512_bf16" not in flags:
        raise SystemExit("make_torch_cpu_fixture: needs an AMD CPU with AVX512-BF16")
    OUT.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    for part in (linear, norm, attention, gated_delta_rule, gates):
        part(generator)
    print(f"{OUT}: {sum(path.stat().st_size for path in OUT.iterdir())} bytes, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
