"""A transformers model as the trainer of a parity check, in the layouts that learners use."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .trainer import logprobs


class TransformersTrainer:
    """Called with the ids of one sequence, int [T]: fp32 [T - 1], log-probabilities of tokens 1 to T - 1.

    source: a checkpoint's directory, loaded in its own dtype with SDPA attention, or a model.
    device: None: the GPU if there is one. temperature: the logits are divided by it, as learners do.
    """

    def __init__(
        self,
        source: str | pathlib.Path | torch.nn.Module,
        *,
        device: str | None = None,
        dtype: str = "auto",
        temperature: float = 1.0,
    ):
        self.temperature = temperature
        if isinstance(source, torch.nn.Module):
            self.model: Any = source
            return
        import transformers

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, attn_implementation="sdpa")
        self.model = model.to(device).eval()

    @torch.no_grad()
    def _forward(self, ids: np.ndarray, **inputs: torch.Tensor) -> np.ndarray:
        """ids [B, L] -> fp32 [B, L - 1]."""
        tokens = torch.as_tensor(ids, dtype=torch.long, device=self.model.device)
        inputs = {
            name: value.to(self.model.device) if torch.is_tensor(value) else value for name, value in inputs.items()
        }
        logits = self.model(input_ids=tokens, use_cache=False, **inputs).logits
        # The whole of the logits, so that rows keep their addresses: the last one of each sequence is dropped after.
        following = torch.roll(tokens, -1, 1)
        return logprobs(logits, following, self.temperature)[:, :-1].float().cpu().numpy()

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return self._forward(np.asarray(tokens)[None])[0]

    def packed(self, sequences: Sequence[np.ndarray], documents: int = 4) -> Iterator[tuple[int, np.ndarray]]:
        """Sequences one behind the other, `documents` to a row, boundaries given as position_ids and cu_seq_lens.

        Yields (place in its row, log-probabilities) for each sequence, in order.
        """
        for begin in range(0, len(sequences), documents):
            row = sequences[begin : begin + documents]
            ends = np.cumsum([len(s) for s in row])
            boundaries = torch.tensor([0, *ends], dtype=torch.int32)
            longest = max(len(s) for s in row)
            values = self._forward(
                np.concatenate(row)[None],
                position_ids=torch.from_numpy(np.concatenate([np.arange(len(s)) for s in row]))[None],
                cu_seq_lens_q=boundaries,
                cu_seq_lens_k=boundaries,
                max_length_q=longest,
                max_length_k=longest,
            )[0]
            for place, (end, sequence) in enumerate(zip(ends, row, strict=True)):
                yield place, values[end - len(sequence) : end - 1]

    def left_padded(self, sequences: Sequence[np.ndarray], batch: int = 4) -> Iterator[tuple[int, np.ndarray]]:
        """Sequences padded on the left to the longest of `batch`, as generate() and many learners do.

        Yields (pad tokens before it, log-probabilities) for each sequence, in order.
        """
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        for begin in range(0, len(sequences), batch):
            rows = sequences[begin : begin + batch]
            longest = max(len(s) for s in rows)
            ids = np.full((len(rows), longest), pad, np.int64)
            mask = np.zeros((len(rows), longest), np.int64)
            for i, sequence in enumerate(rows):
                ids[i, longest - len(sequence) :] = sequence
                mask[i, longest - len(sequence) :] = 1
            positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
            values = self._forward(ids, attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions))
            for i, sequence in enumerate(rows):
                padding = longest - len(sequence)
                yield padding, values[i, padding:]

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.model.state_dict())
