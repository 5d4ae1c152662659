"""Packed and padded batches through a transformers model, every document computed as if it were alone.

transformers computes several documents of a row with an attention mask, which is another program than that of one
sequence, and lets the convolution run across their boundaries; left padding shifts the recurrent layers' chunks. Here
projections, norms and MLPs see one row of documents without padding, and convolution, recurrence and attention run the
stock functions within each document. The backward pass is the stock one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

# Whose masks may be given as a dict by layer type, and whose layers pass keyword arguments on to the functions below.
MODEL_TYPES = ("olmo_hybrid", "olmo3")
_KINDS = {"full_attention", "sliding_attention", "linear_attention"}


def _sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device, without waiting for what that has to do before (CUDA has read pageable memory on return)."""
    return x.to(device, non_blocking=True)


@dataclasses.dataclass(frozen=True)
class Documents:
    """Sequences one behind the other in one row of T tokens."""

    lengths: tuple[int, ...]
    boundaries: torch.Tensor  # int64 [n + 1] from 0 to T, on the model's device
    boundaries_cpu: torch.Tensor
    positions: torch.Tensor  # int64 [1, T]: of each token in its document
    # first_tokens()' answers: every layer asks the same.
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Documents:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        starts = ends[:-1].repeat_interleave(torch.tensor(lengths))
        positions = (torch.arange(int(ends[-1])) - starts)[None]
        return cls(tuple(lengths), _sent(ends, device), ends, _sent(positions, device))

    def first_tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each document's first `count` tokens, or of all if it has fewer: their places in the row, and their places
        in a row of such beginnings with `count` zeros behind each. Both int64 [n], on the model's device.
        """
        if count in self.known:
            return self.known[count]
        lengths = torch.tensor(self.lengths).clamp(max=count)
        index = torch.arange(int(lengths.sum()))
        document = torch.arange(len(lengths)).repeat_interleave(lengths)
        within = index - (lengths.cumsum(0) - lengths)[document]
        first = self.boundaries_cpu[:-1][document] + within
        device = self.boundaries.device
        return self.known.setdefault(count, (_sent(first, device), _sent(index + count * document, device)))


@dataclasses.dataclass(frozen=True)
class _Row:
    """A batch [B, L] as one row. where: int64 [T], the place of each token in the flattened batch; None: all of it."""

    documents: Documents
    where: torch.Tensor | None


# Operations: the stock function, within each document.


def _attention(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def forward(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """query, key, value: [1, heads, T, head_dim]."""
        documents = options.pop("documents", None)
        if documents is None:
            return stock(module, query, key, value, attention_mask, **options)
        window = options.get("sliding_window")
        parts = zip(*(x.split(documents.lengths, 2) for x in (query, key, value)), strict=True)
        outputs = [
            stock(module, q, k, v, _band(q.shape[2], window, q.device) if window else None, **options)[0]
            for q, k, v in parts
        ]
        return torch.cat(outputs, 1), None

    return forward


def _band(length: int, window: int, device: torch.device) -> torch.Tensor | None:
    """The mask of a sliding layer, bool [1, 1, T, T]; None where the window covers all (transformers' own condition)."""
    if length < window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


def _convolution(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def forward(hidden_states: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        """hidden_states: [1, channels, T]. A document's first tokens are the only ones that see another document: they
        are computed once more, behind the zeros with which a convolution begins.
        """
        documents = options.pop("documents", None)
        result = stock(hidden_states, weight=weight, **options)
        if documents is None or weight.shape[-1] == 1:
            return result
        first, apart = documents.first_tokens(weight.shape[-1] - 1)
        count = int(apart.shape[0]) + (weight.shape[-1] - 1) * len(documents.lengths)
        heads = hidden_states.new_zeros(1, hidden_states.shape[1], count)
        heads = heads.index_copy(2, apart, hidden_states.index_select(2, first))
        heads = stock(heads, weight=weight, **options)
        return result.index_copy_(2, first, heads.index_select(2, apart))  # no backward pass reads it

    return forward


def _recurrence(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query, key, value: [1, T, heads, dim]; g, beta: [1, T, heads]."""
        documents = options.pop("documents", None)
        if documents is None:
            return stock(query, key, value, g=g, beta=beta, **options)
        if query.is_cuda and has_fla():
            options |= {"cu_seqlens": documents.boundaries, "cu_seqlens_cpu": documents.boundaries_cpu}
            return stock(query, key, value, g=g, beta=beta, **options)
        # transformers' own function knows no boundaries.
        parts = zip(*(x.split(documents.lengths, 1) for x in (query, key, value, g, beta)), strict=True)
        outputs = [stock(q, k, v, g=g_, beta=beta_, **options)[0] for q, k, v, g_, beta_ in parts]
        return torch.cat(outputs, 1), None

    return forward


@functools.cache
def has_fla() -> bool:
    """Whether transformers finds fla's chunk kernel."""
    try:
        importlib.import_module("fla.ops.gated_delta_rule")
    except Exception:  # as transformers: whatever keeps it from being imported
        return False
    return True


# Batches


def _row_of(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    boundaries: torch.Tensor | None,
    window: int,
) -> _Row | str:
    """How to compute a batch of `shape` = [B, L]: "stock", as it is; "unmasked", its mask left out; or as a row."""
    batch, length = shape
    keep = attention_mask.bool() if attention_mask is not None and not bool((attention_mask == 1).all()) else None
    if boundaries is not None:
        if batch != 1 or keep is not None:
            raise ValueError(f"cu_seq_lens_q with a batch of {batch} rows or padding: want one row without padding")
        ends = boundaries.tolist()
        lengths = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
        if ends[0] != 0 or ends[-1] != length or min(lengths) < 1:
            raise ValueError(f"cu_seq_lens_q: {ends}, want ascending ends of documents from 0 to {length}")
        return _Row(Documents.of(lengths, device), None)
    if keep is None and position_ids is None:
        return "stock"
    where = torch.arange(batch * length, device=device) if keep is None else keep.flatten().nonzero()[:, 0]
    rows = where // length
    new_row = torch.ones_like(where, dtype=torch.bool)
    new_row[1:] = rows[1:] != rows[:-1]
    starts = new_row
    if position_ids is not None:
        positions = position_ids.expand(batch, length).flatten()[where]
        starts = new_row.clone()
        starts[1:] |= positions[1:] != positions[:-1] + 1
    if bool((starts == new_row).all()):  # every row is one document
        if keep is None:
            return "stock"
        ends_in_padding = bool((keep[:, :-1] | ~keep[:, 1:]).all())
        if ends_in_padding and (not window or length < window):
            return "unmasked"  # no token sees what follows it
    edges = [*starts.nonzero()[:, 0].tolist(), len(where)]
    lengths = [end - begin for begin, end in zip(edges, edges[1:], strict=False)]
    return _Row(Documents.of(lengths, device), None if keep is None and batch == 1 else where)


_OF_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")  # what a trainer passes for the loss, beside labels


def _forward(stock: Callable) -> Callable:
    """The forward method of a model class whose own is `stock`."""

    @functools.wraps(stock)
    def forward(
        model: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        known = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        plain = input_ids is not None and (attention_mask is None or getattr(attention_mask, "ndim", 0) == 2)
        if not plain or options.get("past_key_values") is not None or options.get("use_cache"):
            return stock(model, **known, **options)
        kinds = set(model.config.layer_types)
        window = model.config.sliding_window if "sliding_attention" in kinds else 0
        boundaries = options.get("cu_seq_lens_q")
        row = _row_of(input_ids.shape, input_ids.device, attention_mask, position_ids, boundaries, window)
        if row == "stock":
            return stock(model, **known, **options)
        if row == "unmasked":
            return stock(model, input_ids=input_ids, **options)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            options.pop(name, None)
        options |= {"use_cache": False, "documents": row.documents}
        options |= {"attention_mask": dict.fromkeys(kinds), "position_ids": row.documents.positions}  # no masks
        if row.where is None:
            return stock(model, input_ids=input_ids, **options)
        labels = options.pop("labels", None)
        of_loss = {name: options.pop(name) for name in _OF_LOSS if name in options}
        return_dict = options.pop("return_dict", None)
        batch, length = input_ids.shape
        kept, target = length, row.where
        asked = options.pop("logits_to_keep", 0)
        if not isinstance(asked, int):
            raise ValueError("logits_to_keep: a tensor with padded or several packed rows, want an int")
        if asked:
            kept = min(asked, length)
            wanted = (row.where % length >= length - kept).nonzero()[:, 0]
            options["logits_to_keep"] = wanted
            target = row.where[wanted]
            target = target // length * kept + target % length - (length - kept)
        output = stock(model, input_ids=input_ids.flatten()[row.where][None], return_dict=True, **options)
        logits = output.logits.new_zeros(batch * kept, output.logits.shape[-1])
        logits = logits.index_copy_(0, target, output.logits[0]).view(batch, kept, -1)
        loss = None
        if labels is not None:
            loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **of_loss)
        output = dataclasses.replace(output, loss=loss, logits=logits)
        return output if (model.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    return forward


# Into a model, and out of it


def supports(model: Any) -> bool:
    """Whether install() may be called. sdpa: other attention implementations treat boundaries in their own way."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel) or not hasattr(model, "lm_head"):
        return False
    config, modeling = model.config, sys.modules[type(model).__module__]
    if config.model_type not in MODEL_TYPES or config._attn_implementation != "sdpa":
        return False
    kinds = set(config.layer_types)
    recurrent = "linear_attention" not in kinds or all(hasattr(modeling, name) for name in _RECURRENT)
    return kinds <= _KINDS and recurrent


def installed(model: Any) -> bool:
    return any(kind in _classes.values() for kind in type(model).__mro__)


_classes: dict[type, type] = {}  # by the stock class: the one with another forward method


def install(model: Any) -> None:
    """Gives the model's class another forward method: of a subclass of the same name, so that copies and wrappers of the
    model keep it. What is replaced of transformers, for the whole process, does as before for any other caller.
    """
    if installed(model):
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = type(model)
    modeling = sys.modules[stock.__module__]
    if stock not in _classes:
        _wrap_once(
            ALL_ATTENTION_FUNCTIONS["sdpa"], _attention, functools.partial(ALL_ATTENTION_FUNCTIONS.register, "sdpa")
        )
        for name, wrap in _RECURRENT.items():
            if hasattr(modeling, name):
                _wrap_once(getattr(modeling, name), wrap, functools.partial(setattr, modeling, name))
        members = {
            "forward": _forward(stock.forward),
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
        }
        _classes[stock] = type(stock.__name__, (stock,), members)
    model.__class__ = _classes[stock]


_RECURRENT = {"causal_conv1d_fn": _convolution, "torch_chunk_gated_delta_rule": _recurrence}


def _wrap_once(function: Any, wrap: Callable, put: Callable) -> None:
    if not hasattr(function, "lockstep_documents"):
        wrapped = wrap(function)
        wrapped.lockstep_documents = True
        put(wrapped)


def remove(model: Any) -> None:
    """The model's own class again, where install() has changed it."""
    for stock, ours in _classes.items():
        if type(model) is ours:
            model.__class__ = stock
