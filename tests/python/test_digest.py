"""lockstep.digest: fixed values, numpy against torch, and that accidents show."""

import json
import random

import numpy as np
import pytest
import torch

from lockstep import digest

MASK = (1 << 64) - 1


def plain(data: bytes) -> int:
    """The definition, word by word."""

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    padded = data + bytes(-len(data) % 8)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    total = sum(mix((w + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i, w in enumerate(words))
    return mix((total + len(data)) & MASK)


def pattern(size: int) -> bytes:
    """What digest_golden.json describes: byte i is (131 i + 7 + i // 256) mod 256."""
    return bytes((131 * i + 7 + i // 256) % 256 for i in range(size))


def test_golden_values(repo_root):
    golden = json.loads((repo_root / "tests/data/digest_golden.json").read_text())["cases"]
    assert len(golden) >= 12
    for case in golden:
        data = bytes.fromhex(case["hex"]) if "hex" in case else pattern(case["pattern_bytes"])
        array = np.frombuffer(data, np.uint8)
        want = int(case["digest"], 16)
        assert plain(data) == want, case
        assert digest(array) == want, case
        assert digest(torch.from_numpy(array.copy())) == want, case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (65536 * 8 + 3,), (200, 1031)])
def test_numpy_equals_torch(dtype, shape):
    tensor = (torch.randn(shape) * 100).to(dtype)
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    assert digest(tensor) == digest(flat)
    if flat.size < 20000:
        assert digest(tensor) == plain(flat.tobytes())


def test_views_and_odd_addresses():
    base = torch.randn(40, 33)
    for view in (base.T, base[1:, 1:], base[:, ::2], base[3]):
        assert digest(view) == digest(view.clone(memory_format=torch.contiguous_format)) == digest(view.numpy())
    odd = torch.arange(255, dtype=torch.uint8)[1:249]
    assert digest(odd) == digest(odd.clone())
    assert digest(base.numpy().astype(">f4")) == digest(base)


def test_every_accident_shows():
    generator = random.Random(1)
    original = np.random.default_rng(2).integers(0, 256, (64, 96), np.uint8)
    want, seen = digest(original), set()
    for _ in range(200):
        damaged = original.copy()
        damaged.reshape(-1)[generator.randrange(damaged.size)] ^= 1 << generator.randrange(8)
        seen.add(digest(damaged))
    rows = original.copy()
    rows[[3, 4]] = rows[[4, 3]]
    seen |= {digest(rows), digest(original[:-1]), digest(original.reshape(-1)[:-1]), digest(original[::-1])}
    assert want not in seen and len(seen) > 195
    # Zeros at the end count, padding does not stand in for them.
    assert digest(np.zeros(7, np.uint8)) != digest(np.zeros(8, np.uint8)) != digest(np.zeros(16, np.uint8))


def test_wrong_types():
    with pytest.raises(TypeError, match="list"):
        digest([1, 2])
    with pytest.raises(TypeError, match="object"):
        digest(np.array([{}, 1], dtype=object))
    with pytest.raises(TypeError, match="meta"):
        digest(torch.empty(3, device="meta"))
