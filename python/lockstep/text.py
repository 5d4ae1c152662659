"""Text to token ids and back, with a Hugging Face tokenizer (transformers' or tokenizers')."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def load_tokenizer(directory: str | pathlib.Path) -> Any:
    """tokenizers.Tokenizer of a checkpoint's tokenizer.json."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(pathlib.Path(directory) / "tokenizer.json"))


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 [T] for each text, without special tokens: exactly what the text says."""
    if isinstance(texts, str):
        raise TypeError("encode: a string, want a list of strings")
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [np.array(getattr(i, "ids", i), np.int32) for i in ids]


def decode(tokenizer: Any, sequences: Iterable[Sequence[int] | np.ndarray], skip_special: bool = True) -> list[str]:
    """The text of each sequence of ids."""
    return [tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special) for ids in sequences]
