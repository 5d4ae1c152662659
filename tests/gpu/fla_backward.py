"""A stand-in for the one backward kernel that fla does not run on Hopper with Triton 3.4 to 3.7.0.

There fla 0.5.2 raises instead of running chunk_bwd_dqkwg (Triton compiles it wrongly) unless tilelang is installed, so
no Olmo Hybrid model has gradients. The same gradients in PyTorch, fp32 inside, registered as one of fla's own backends,
let the checks here go on. For checks alone: it is slower than a kernel, equally so for stock and aligned models.
"""

import importlib.util

import torch

STAND_IN = "fla's, chunk_bwd_dqkwg in PyTorch (Triton {}, no tilelang)"


def gradients(q, k, v, do, h, dh, dv, w, g, scale, rows, valid):
    """dq, dk, dw: fp32 [tokens, heads, K]; dg: fp32 [tokens, heads].

    q, k, w: [tokens, heads, K]. v, do, dv: [tokens, heads, V]. g: [tokens, heads], cumulated in its chunk, times
    log2(e). h, dh: [chunks, heads, K, V], the state before each chunk, and the gradient of the one after it. rows,
    valid: int64 and bool [chunks, 64], the tokens of each chunk.
    """

    def chunks(x):
        """[tokens, heads, ...] -> fp32 [chunks, heads, 64, ...], zeros past a chunk's end."""
        taken = x[rows].float()
        taken = taken * valid.view(*valid.shape, *[1] * (x.dim() - 1))
        return taken.transpose(1, 2)

    q, k, v, do, dv, w = map(chunks, (q, k, v, do, dv, w))
    # Past the end g goes on with the chunk's last value: its power of 2 must stay finite.
    last = valid.sum(1) - 1
    g = g.float()[torch.where(valid, rows, rows.gather(1, last[:, None]))].transpose(1, 2)
    g_last = g[..., -1:]
    h, dh = h.float(), dh.float()
    causal = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=q.device).tril()
    dw = -(dv @ h.transpose(-1, -2))
    dq = (do @ h.transpose(-1, -2)) * torch.exp2(g)[..., None] * scale
    dk = (v @ dh.transpose(-1, -2)) * torch.exp2(g_last - g)[..., None]
    dg_last = (h * dh).sum((-1, -2)) * torch.exp2(g_last[..., 0]) + (dk * k).sum((-1, -2))
    decay = torch.exp2((g[..., :, None] - g[..., None, :]).masked_fill(~causal, float("-inf")))
    ds = (do @ v.transpose(-1, -2)) * decay * scale
    dq = dq + ds @ k
    dk = dk + ds.transpose(-1, -2) @ q
    dg = (dq * q).sum(-1) - (dk * k).sum(-1)
    dg = dg.scatter_add(2, last[:, None, None].expand(-1, dg.shape[1], 1), dg_last[..., None])

    tokens = int(valid.sum())

    def back(x):
        """[chunks, heads, 64, ...] -> [tokens, heads, ...]."""
        x = x.transpose(1, 2)
        return x.new_empty(tokens, *x.shape[2:]).index_copy_(0, rows[valid], x[valid])

    return back(dq), back(dk), back(dw), back(dg)


def chunk_rows(batch, length, chunk, boundaries, device):
    """(rows, valid) of gradients(): the chunks of `batch` sequences, or of one row's documents."""
    if boundaries is None:
        boundaries = [i * length for i in range(batch + 1)]
    begins, ends = [], []
    for begin, end in zip(boundaries, boundaries[1:]):
        for at in range(begin, end, chunk):
            begins.append(at)
            ends.append(end)
    rows = torch.tensor(begins)[:, None] + torch.arange(chunk)
    valid = rows < torch.tensor(ends)[:, None]
    return torch.where(valid, rows, torch.tensor(begins)[:, None]).to(device), valid.to(device)


def install():
    """Registers it where fla would raise. Returns what the backward pass now is, in words; call it once."""
    import triton
    from fla.ops.backends import BackendRegistry, BaseBackend
    from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1

    raises = IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1
    if not raises or importlib.util.find_spec("tilelang") is not None:
        return "fla's"

    class InPyTorch(BaseBackend):
        backend_type = "pytorch"
        package_name = None
        env_var = None
        priority = 0  # before the others

        def chunk_bwd_dqkwg_verifier(self, *arguments, **options):
            return True, None

        def chunk_bwd_dqkwg(
            self,
            q,
            k,
            v,
            do,
            h,
            dh,
            w=None,
            g=None,
            g_gamma=None,
            dv=None,
            scale=None,
            state_v_first=False,
            cu_seqlens=None,
            chunk_size=64,
            chunk_indices=None,
        ):
            if g_gamma is not None or w is None or g is None or state_v_first or k.shape[2] != v.shape[2]:
                raise ValueError("chunk_bwd_dqkwg: want g, w and as many key as value heads, as Olmo Hybrid has")
            batch, length = k.shape[:2]
            boundaries = cu_seqlens.tolist() if cu_seqlens is not None else None
            rows, valid = chunk_rows(batch, length, chunk_size, boundaries, k.device)
            tokens = (x.flatten(0, 1) for x in (q, k, v, do))
            states = (x.flatten(0, 1) for x in (h, dh))
            dq, dk, dw, dg = gradients(*tokens, *states, *(x.flatten(0, 1) for x in (dv, w, g)), scale, rows, valid)
            return dq.to(q.dtype).view_as(q), dk.to(k.dtype).view_as(k), dw.to(w.dtype).view_as(w), dg.view_as(g)

    BackendRegistry.ensure_initialized("common")
    BackendRegistry._registries["common"].register(InPyTorch())
    return STAND_IN.format(triton.__version__)
