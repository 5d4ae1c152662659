#!/usr/bin/env python3
"""Writes tests/data/model/tokenizer_{byte_level,byte_fallback}.json: small tokenizers, each with the bytes of every id.

The bytes are worked out here and checked against the `tokenizers` library's decode (made with 0.23). tokenizer_test.cc compares TokenBytes with them.
"""

import argparse
import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = ["hello world, hello there", "naïve café — 日本語 🙂", "x = 1 + 2\n\tif x:\n", "  two  spaces  "]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>", "<|pad|>"]
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False), "a b", "日本", "éé", "Ġy"])
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer


def byte_fallback():
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    pieces += ["▁", "a", "b", "é", "日", "ab", "▁a", "▁ab", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<0x0a>", "<0xZZ>", "x▁y", "tool call"])
    return tokenizer


def byte_level_bytes(token):
    itself = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in itself}
    table |= {chr(0x100 + n): b for n, b in enumerate(b for b in range(256) if b not in itself)}
    if all(c in table for c in token):
        return bytes(table[c] for c in token)
    return token.encode()


def byte_fallback_bytes(token):
    token = token.replace("▁", " ")
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.encode()


def expected(tokenizer, rule, before):
    """Hex bytes by id, None for a gap; `before`: a token whose text keeps the token under test from standing first."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    out = []
    for token_id in range(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1):
        token = tokenizer.id_to_token(token_id)
        if token is None:
            out.append(None)
            continue
        value = b"" if token_id in special else rule(token)
        first = tokenizer.token_to_id(before)
        decoded = tokenizer.decode([first, token_id], skip_special_tokens=True)
        want = before + value.decode(errors="replace")
        assert decoded == want, (token_id, token, decoded, want)
        out.append(value.hex())
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    default = pathlib.Path(__file__).resolve().parent.parent / "tests/data/model"
    parser.add_argument("--output_dir", type=pathlib.Path, default=default)
    args = parser.parse_args()
    for name, make, rule, before in (
        ("byte_level", byte_level, byte_level_bytes, "h"),
        ("byte_fallback", byte_fallback, byte_fallback_bytes, "b"),
    ):
        tokenizer = make()
        value = {"tokenizer": json.loads(tokenizer.to_str()), "bytes": expected(tokenizer, rule, before)}
        path = args.output_dir / f"tokenizer_{name}.json"
        path.write_text(json.dumps(value) + "\n")
        print(f"{path}: {len(value['bytes'])} ids")


if __name__ == "__main__":
    main()
