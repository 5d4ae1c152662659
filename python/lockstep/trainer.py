"""The learner's side of equal log-probabilities: settings that a stock trainer needs, and log-probabilities for a loss."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any

import torch

from . import _documents

# What profiles hf and hf-flash were compared with in bits (docs/numerics.md).
VERIFIED = {"torch": "2.11", "transformers": "5.17", "flash-linear-attention": "0.5.2"}

# Rows at a time: bounds the fp32 temporaries to a few [_ROWS, vocab].
_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Finding:
    """level "wrong": log-probabilities will differ. "check": they may; the text says when."""

    level: str
    what: str
    change: str


@dataclasses.dataclass
class AlignReport:
    settings: list[str]  # what align() has set
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return not any(finding.level == "wrong" for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"set: {text}" for text in self.settings]
        lines += [f"{f.level}: {f.what}. {f.change}." for f in self.findings]
        return "\n".join(lines)


def align(model: torch.nn.Module, worker: Any = None) -> AlignReport:
    """Makes a transformers model's forward pass a function of the prefix, as far as it can; reports the rest.

    Sets, for the whole process, the two PyTorch settings under which no matrix product splits its sum:
    torch.backends.cuda.preferred_blas_library("cublaslt") and matmul.allow_bf16_reduced_precision_reduction =
    (False, False). On a machine without a GPU nothing is set.

    Gives an Olmo Hybrid or Olmo 3 model (causal LM, SDPA) a forward pass in which each document of a packed or padded
    batch is computed as if it were alone; a batch without boundaries and padding takes the stock one. Boundaries are
    cu_seq_lens_q of one row, or position_ids that do not go up by one; padding is what attention_mask says, and its
    logits are zeros, or after a row's end whatever comes out. This holds for calls without a cache: use_cache=True or
    past_key_values leave the call to transformers, None counts as False where there are boundaries or padding inside.
    ValueError for cu_seq_lens_q with several rows or with padding. unalign() takes all of it back.

    worker: rollout.proto's GetInfoResponse (one of RolloutClient.info()'s values), to check against its profile.
    """
    settings: list[str] = []
    findings: list[Finding] = []

    def report(level: str, what: str, change: str) -> None:
        findings.append(Finding(level, what, change))

    on_gpu = _on_gpu(model)
    if torch.cuda.is_available():
        global _before
        _before = _before or _blas()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
        settings.append('torch.backends.cuda.preferred_blas_library("cublaslt")')
        settings.append("torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)")
    if _documents.supports(model):
        _documents.install(model)
        settings.append("packed and padded batches: every document as if it were alone")
    numerics = worker.numerics if worker is not None else None
    profile = numerics.profile if numerics is not None else ""
    gpu_profile = numerics is None or (profile.startswith("hf") and profile != "hf-torch")
    if numerics is not None and gpu_profile and not on_gpu:
        report(
            "wrong",
            f"the worker computes a GPU trainer's arithmetic ({profile}), the model is on a CPU",
            "Train on a GPU, or start the worker with --numerics hf-torch",
        )
    if numerics is not None and not gpu_profile and on_gpu:
        report(
            "wrong",
            f"the worker's profile is {profile}, the model is on a GPU",
            "Start the worker with --backend cuda --numerics hf",
        )

    if numerics is not None or on_gpu:
        findings += _dtypes(model, profile, numerics.weights_dtype if numerics is not None else "bfloat16")
    findings += _autocast(profile)

    compiled = isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )
    if compiled:
        report("wrong", "the model is compiled", "Use it uncompiled: torch.compile fuses casts away")
    if getattr(model, "use_kernels", False):
        report("wrong", "the model uses hub kernels", "Load it with use_kernels=False")
    odd = misaligned(model)
    if odd and on_gpu:  # on a CPU the loader itself leaves them anywhere
        report(
            "wrong",
            f"{len(odd)} parameters do not lie at multiples of 16 bytes ({odd[0]})",
            "Flat FSDP or ZeRO buffers: pad each parameter to 16 bytes; cuBLAS takes other kernels otherwise",
        )

    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "sdpa"):
        report(
            "wrong",
            f"attn_implementation is {attention!r}, the worker follows PyTorch's SDPA",
            "Load the model with attn_implementation='sdpa'",
        )
    if on_gpu and numerics is not None and gpu_profile:
        findings += _sdpa(profile)
    if model.training and getattr(config, "attention_dropout", 0.0):
        report("wrong", f"attention_dropout is {config.attention_dropout}", "Set it to 0")
    layers = getattr(config, "layer_types", None) or []
    if "sliding_attention" in layers:
        findings.append(_window(profile, config.sliding_window))
    if not _documents.installed(model):
        report(
            "check",
            "packed and padded batches are computed as the model does it",
            "Pass sequences alone, or of one length: masks and padding are other programs than the worker's",
        )
    if "linear_attention" in layers:
        if _documents.installed(model):
            report(
                "check",
                "recurrent layers",
                "Packed rows need boundaries: cu_seq_lens_q, or position_ids that begin again at each document",
            )
        if on_gpu and importlib.util.find_spec("fla") is None:
            report(
                "wrong",
                "flash-linear-attention is not installed",
                "pip install flash-linear-attention: the worker follows its chunk kernel",
            )
        if importlib.util.find_spec("causal_conv1d") is not None and (numerics is None or numerics.conv_casts == "two"):
            report("wrong", "causal_conv1d is installed and rounds once, the worker's profile twice", "Uninstall it")
    if on_gpu and gpu_profile:
        for package, version in VERIFIED.items():
            try:
                found = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
            if not found.startswith(version):
                report("check", f"{package} {found}, compared in bits was {version}", "Run `lockstep parity`")
    return AlignReport(settings, findings)


def _on_gpu(model: torch.nn.Module) -> bool:
    return any(p.is_cuda for p in model.parameters())


def _dtypes(model: torch.nn.Module, profile: str, want: str) -> list[Finding]:
    """want: of the worker's matrices. Autocast's trainer holds fp32 and casts at every use."""
    found = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.ndim >= 2}))
    if profile.startswith("hf-autocast"):
        what = f"matrices are {found}, profile {profile} is of float32 under autocast"
        want, change = "float32", "Load the model with dtype=float32, or start the worker with --numerics hf"
    else:
        what = f"matrices are {found}, the worker computes with {want}"
        change = f"Load the model with dtype={want}; fp32 masters belong into the optimiser"
    return [Finding("wrong", what, change)] if found != want else []


def _autocast(profile: str) -> list[Finding]:
    on = [device for device in ("cuda", "cpu") if torch.is_autocast_enabled(device)]
    if not profile.startswith("hf-autocast"):
        change = "Run the forward pass outside torch.autocast: it casts in other places"
        return [Finding("wrong", "autocast is on", change)] if on else []
    change = 'Run the forward pass under torch.autocast("cuda", dtype=torch.bfloat16)'
    if not on:  # trainers switch it on for the forward pass alone
        return [Finding("check", f"autocast is off here, profile {profile} follows it", change)]
    others = {torch.get_autocast_dtype(device) for device in on} - {torch.bfloat16}
    return [Finding("wrong", f"autocast casts to {dtype}, profile {profile} to bfloat16", change) for dtype in others]


def _sdpa(profile: str) -> list[Finding]:
    """The attention backend that a GPU profile follows."""
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    if profile == "hf-flash":
        what, change = "SDPA may take cuDNN, profile hf-flash follows FlashAttention-2", "enable_cudnn_sdp(False)"
        return [Finding("wrong", what, f"torch.backends.cuda.{change}")] if cudnn else []
    change = "torch.backends.cuda.enable_cudnn_sdp(True)"
    change += ", or the worker's --numerics hf-flash" if profile == "hf" else ""
    what = f"SDPA's cuDNN backend is off, profile {profile} follows it"
    return [] if cudnn else [Finding("wrong", what, change)]


def _window(profile: str, window: int) -> Finding:
    """A trainer computes sliding layers by another program as soon as its forward is as long as the window."""
    shorter, longer = f"forwards shorter than {window} tokens", f"forwards of {window} tokens or more"
    if profile.endswith("-masked"):
        program, others = longer, f"the worker's --numerics {profile.removesuffix('-masked')}"
    elif profile == "hf-flash":
        program, others = shorter, "SDPA's cuDNN backend and the worker's --numerics hf-masked"
    elif profile in ("hf", "hf-autocast"):
        program, others = shorter, f"the worker's --numerics {profile}-masked"
    else:
        change = f"A GPU trainer is no function of the prefix: hf is its program of {shorter}, hf-masked of the others"
        return Finding("check", f"sliding layers of {window} tokens", change)
    what = f"sliding layers: {profile} is the trainer's program of {program}"
    return Finding("check", what, f"For others: {others}")


_before: tuple[Any, Any] | None = None  # PyTorch's settings before the first align()


def _blas() -> tuple[Any, Any]:
    matmul = torch.backends.cuda.matmul
    return torch.backends.cuda.preferred_blas_library(), matmul.allow_bf16_reduced_precision_reduction


def unalign(model: torch.nn.Module) -> None:
    """Takes align() back: PyTorch's settings as they were before the first one, and the model's own forward pass."""
    global _before
    if _before is not None:
        torch.backends.cuda.preferred_blas_library(_before[0])
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = _before[1]
        _before = None
    _documents.remove(model)


def misaligned(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that do not begin at a multiple of 16 bytes, as in a flat buffer without padding."""
    return [name for name, parameter in model.named_parameters() if parameter.data_ptr() % 16]


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        result = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
        # PyTorch's CUDA kernel sums in an order that depends on a row's address modulo 16 bytes; a row alone is aligned.
        step = _ROWS if logits.shape[1] % 4 == 0 or not logits.is_cuda else 1
        for begin in range(0, len(tokens), step):
            rows = slice(begin, begin + step)
            scaled = logits[rows].float()
            if temperature != 1.0:
                scaled = scaled / temperature
            result[rows] = torch.log_softmax(scaled, -1).gather(1, tokens[rows, None])[:, 0]
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, tokens = ctx.saved_tensors
        result = torch.empty_like(logits)
        for begin in range(0, len(tokens), _ROWS):
            rows = slice(begin, begin + _ROWS)
            scaled = logits[rows].float()
            if ctx.temperature != 1.0:
                scaled = scaled / ctx.temperature
            block = torch.softmax(scaled, -1).mul_(-gradient[rows, None])
            block.scatter_add_(1, tokens[rows, None], gradient[rows, None].float())
            result[rows] = block / ctx.temperature if ctx.temperature != 1.0 else block
        return result, None, None


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log_softmax(logits / temperature) at `tokens`: fp32 [...], the worker's kind TEMPERATURE.

    logits: [..., vocab], bf16, fp16 or fp32. tokens: integers [...]: logits[..., t, :] are those that predict
    tokens[..., t] (for a causal model: logits[:, :-1] and input_ids[:, 1:]). temperature: 0 (greedy) counts as 1.

    Differentiable (once) in logits. Works in blocks of rows: keeps no fp32 copy of the logits. Raises ValueError for
    shapes that do not fit, dtypes, or a temperature below 0.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)}: want [..., vocab] and [...]")
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"logits are {logits.dtype}, want bfloat16, float16 or float32")
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise ValueError(f"tokens are {tokens.dtype}, want integers")
    if not temperature >= 0:
        raise ValueError(f"temperature: {temperature}, want 0 or more")
    flat = logits.reshape(-1, logits.shape[-1])
    return _Logprobs.apply(flat, tokens.reshape(-1).long(), float(temperature) or 1.0).view(tokens.shape)
