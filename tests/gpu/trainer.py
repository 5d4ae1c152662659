"""The trainer: transformers (with fla's kernels on a GPU), its forward pass and its log-probabilities."""

import contextlib
import importlib
import json
import math
import pathlib
import platform

import numpy
import torch

# Rows of a log_softmax at a time. PyTorch's order of summation depends on a row's address modulo 16 bytes, so where the
# vocabulary is no multiple of 4 each row is taken alone, which aligns it: the order that a worker has for every row.
ROWS = 1024

MODES = ("stock", "nosplit")
ATTENTION = ("cudnn", "flash")


@contextlib.contextmanager
def blas_mode(mode):
    """`stock`: PyTorch's defaults. `nosplit`: the two documented settings under which no matrix product splits k."""
    if mode == "stock":
        yield
        return
    if mode != "nosplit":
        raise ValueError(f"mode {mode!r}, want one of {MODES}")
    matmul = torch.backends.cuda.matmul
    library, reduction = torch.backends.cuda.preferred_blas_library(), matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.preferred_blas_library("cublaslt")
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(library)
        matmul.allow_bf16_reduced_precision_reduction = reduction


def attention_backend(name):
    """`cudnn`: what PyTorch picks by itself on Hopper. `flash`: its FlashAttention-2."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name == "cudnn":
        return contextlib.nullcontext()
    if name != "flash":
        raise ValueError(f"attention {name!r}, want one of {ATTENTION}")
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def window(model):
    """Of the layers that have one; 0 for none. A forward of so many tokens or more gives these layers' attention a mask:
    cuDNN then runs another program, and PyTorch's flash attention cannot run.
    """
    config = model.config
    return config.sliding_window if "sliding_attention" in config.layer_types else 0


def longest_sequence(model, masked=False):
    """That the trainer computes with the one program of attention, masked or not."""
    sliding = window(model)
    return sliding - 1 if sliding and not masked else model.config.max_position_embeddings


def shortest_sequence(model, attention, masked=False):
    """From which on the trainer's attention is one program: PyTorch's flash attention splits the keys of smaller work
    over the card and joins the parts, in another order than it takes for a longer sequence of the same tokens.
    """
    if masked:
        if not window(model):
            raise ValueError(f"{model.config.model_type} has no layer with a window: want no masked variant of it")
        return window(model)
    if attention != "flash" or not torch.cuda.is_available():
        return 1
    # FlashAttention-2's num_splits_heuristic: one split from 0.8 times two blocks a processor on; a block is 64 queries.
    blocks = 0.8 * 2 * torch.cuda.get_device_properties(0).multi_processor_count
    return (math.ceil(blocks / model.config.num_attention_heads) - 1) * 64 + 1


def pin_fla_configurations(backward=False):
    """One configuration for each of fla's forward kernels instead of a search among them: the search takes a minute,
    and the configurations differ in speed only (but for three of l2norm's 25, which a search may pick).

    backward: for those of the backward pass too.
    """
    kernels = {
        "fla.ops.gated_delta_rule.chunk_fwd": ["chunk_gated_delta_rule_fwd_kkt_solve_kernel"],
        "fla.ops.gated_delta_rule.wy_fast": ["recompute_w_u_fwd_kernel"],
        "fla.ops.common.chunk_delta_h": ["chunk_gated_delta_rule_fwd_kernel_h_blockdim64"],
        "fla.ops.common.chunk_o": ["chunk_fwd_kernel_o"],
        "fla.modules.l2norm": ["l2norm_fwd_kernel"],
        "fla.ops.utils.cumsum": ["chunk_local_cumsum_scalar_kernel"],
    }
    if backward:
        kernels["fla.ops.gated_delta_rule.wy_fast"].append("prepare_wy_repr_bwd_kernel")
        kernels["fla.ops.common.chunk_delta_h"].append("chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64")
        kernels["fla.ops.common.chunk_o"] += ["chunk_bwd_kernel_dqkwg", "chunk_bwd_kernel_dv_local"]
        kernels["fla.modules.l2norm"].append("l2norm_bwd_kernel")
    for module, names in kernels.items():
        for name in names:
            kernel = getattr(importlib.import_module(module), name)
            while not hasattr(kernel, "configs"):
                kernel = kernel.fn
            kernel.configs = kernel.configs[:1]


def gdn_kernel(model):
    """Whose chunk program the model's recurrent layers run: a dotted name; empty without such layers."""
    if not any(hasattr(layer, "linear_attn") for layer in model.model.layers):
        return ""
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid

    function = modeling_olmo_hybrid.torch_chunk_gated_delta_rule
    found, seen = f"{function.__module__}.{function.__name__}", set()
    stack = [function]
    while stack:  # the decorators of transformers keep the function they call in a closure
        function = stack.pop()
        if id(function) in seen or not callable(function):
            continue
        seen.add(id(function))
        if (getattr(function, "__module__", None) or "").startswith("fla."):
            return f"{function.__module__}.{function.__name__}"
        stack.extend(cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
        stack.append(getattr(function, "__wrapped__", None))
    return found


def load(directory, device="cuda", dtype=torch.bfloat16, autocast=False):
    """The checkpoint as a learner loads it. autocast: with fp32 weights, its forward under autocast to bf16, as
    accelerate prepares it.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    architecture = json.loads((pathlib.Path(directory) / "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers, architecture)
    model, info = model_class.from_pretrained(
        directory, dtype=torch.float32 if autocast else dtype, attn_implementation="sdpa", output_loading_info=True
    )
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"transformers loaded {directory} with {wrong}")
    model = model.to(device).eval()
    model.runs_under_autocast = autocast
    if autocast:
        model.forward = torch.autocast(device, dtype=torch.bfloat16)(model.forward)
    kernel = gdn_kernel(model)
    if device == "cuda" and kernel and not kernel.startswith("fla."):
        raise RuntimeError(f"the recurrent layers run {kernel}, want fla's: is flash-linear-attention installed?")
    return model


def is_autocast(model):
    return getattr(model, "runs_under_autocast", False)


@torch.no_grad()
def token_logprobs(model, batch, wanted=None):
    """fp32 log_softmax of the logits at each next token: [B, T - 1] for B sequences of equal length T.

    wanted: ids [T - 1, K], for B = 1: also the log-probabilities of those, [T - 1, K].
    """
    ids = torch.as_tensor(numpy.asarray(batch), device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    if not logits.is_contiguous():
        raise RuntimeError("the logits are not contiguous")
    count, length, vocab = logits.shape
    logits = logits.view(count * length, vocab)
    following = torch.roll(ids, -1, 1).view(-1, 1)
    if wanted is not None:
        wanted = torch.as_tensor(wanted, device=model.device)
        wanted = torch.cat([wanted, wanted.new_zeros(1, wanted.shape[1])])
        following = torch.cat([following, wanted], 1)
    step = ROWS if vocab % 4 == 0 else 1
    rows = [
        torch.log_softmax(logits[begin : begin + step].float(), -1).gather(1, following[begin : begin + step])
        for begin in range(0, count * length, step)
    ]
    values = torch.cat(rows).view(count, length, -1)[:, :-1].cpu().numpy()
    return values[..., 0] if wanted is None else (values[..., 0], values[0, :, 1:])


def versions():
    """Libraries and device, as far as they are here."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "fla", "triton"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            pass
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found
