"""The stand-in for fla's chunk_bwd_dqkwg: the gradients of the chunk program, by autograd in fp64."""

import math

import fla_backward
import pytest
import torch


def program(q, k, w, g, v, h, do, dh, dv, scale):
    """One chunk of one head, a sum whose gradients are asked for. q, k, w [T, K]; g [T], natural; v, do, dv [T, V]."""
    inside = (q @ k.T * (g[:, None] - g[None, :]).exp()).tril()
    output = scale * (q * g.exp()[:, None]) @ h + scale * inside @ v
    after = h * g[-1].exp() + (k * (g[-1] - g).exp()[:, None]).T @ v
    return (output * do).sum() + (after * dh).sum() - (dv * (w @ h)).sum()


@pytest.mark.parametrize("boundaries", [None, [0, 5, 13, 14]])
def test_gradients(boundaries):
    torch.manual_seed(0)
    batch, length, heads, size, values, chunk = (2, 7, 2, 6, 4, 4) if boundaries is None else (1, 14, 2, 6, 4, 4)
    rows, valid = fla_backward.chunk_rows(batch, length, chunk, boundaries, "cpu")
    tokens = batch * length
    q, k, w = (torch.randn(tokens, heads, size) for _ in range(3))
    v, do, dv = (torch.randn(tokens, heads, values) for _ in range(3))
    h, dh = (torch.randn(len(rows), heads, size, values) for _ in range(2))
    g = torch.empty(tokens, heads)
    for i in range(len(rows)):
        g[rows[i][valid[i]]] = -torch.rand(int(valid[i].sum()), heads).cumsum(0)
    got = fla_backward.gradients(q, k, v, do, h, dh, dv, w, g / math.log(2), 0.3, rows, valid)
    for i in range(len(rows)):
        at = rows[i][valid[i]]
        for head in range(heads):
            inputs = [x[at, head].double().requires_grad_() for x in (q, k, w, g)]
            rest = [x.double() for x in (v[at, head], h[i, head], do[at, head], dh[i, head], dv[at, head])]
            wanted = torch.autograd.grad(program(*inputs, *rest, 0.3), inputs)
            for name, ours, want in zip("qkwg", got, wanted):
                torch.testing.assert_close(ours[at, head].double(), want, rtol=1e-4, atol=1e-4, msg=f"d{name}")


def test_chunks_cover_every_token_once():
    rows, valid = fla_backward.chunk_rows(1, 200, 64, [0, 64, 65, 200], "cpu")
    assert rows[valid].tolist() == list(range(200)) and valid.sum(1).tolist() == [64, 1, 64, 64, 7]
