#!/usr/bin/env python3
"""Writes the seed corpora of the fuzz targets, tests/data/fuzz/{safetensors,config}: small inputs that reach the parsers' branches.

Uses only the standard library. The config seeds are those of tests/data/model/rope.json and a few more.
"""

import json
import pathlib
import struct

DATA = pathlib.Path(__file__).resolve().parent.parent / "tests/data"


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "no_tensors": safetensors({}),
    "metadata": safetensors({"__metadata__": {"format": "pt"}}),
    "two": safetensors({"a": tensor("F32", [2, 2], 0, 16), "b": tensor("BF16", [3], 16, 22)}, b"x" * 22),
    "scalar_and_empty": safetensors({"s": tensor("I64", [], 0, 8), "e": tensor("F16", [0, 4], 8, 8)}, b"x" * 8),
    "small_types": safetensors({"a": tensor("F4", [4], 0, 2), "b": tensor("F6_E2M3", [4], 2, 5), "c": tensor("BOOL", [1], 5, 6)}, b"x" * 6),
    "hole": safetensors({"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 2, 3)}, b"xyz"),
    "overlap": safetensors({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, b"xyz"),
    "overflow": safetensors({"a": tensor("F64", [2**32, 2**32], 0, 0)}),
    "duplicate": safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"x"),
    "deep": safetensors(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"),
    "long_header": struct.pack("<Q", 2**63) + b"{}",
    "short": b"\x02\x00",
    "index": json.dumps({"metadata": {"total_size": 4}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}).encode(),
    "index_path": json.dumps({"weight_map": {"a": "../x.safetensors"}}).encode(),
}


def tokenizer(decoder, vocab, added=()):
    return b"T" + json.dumps({"added_tokens": list(added), "decoder": decoder, "model": {"type": "BPE", "vocab": vocab}}).encode()


FALLBACK = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
HYBRID = {
    "model_type": "olmo_hybrid",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "rope_theta": None,
}
ALL_FIELDS = HYBRID | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "layer_types": ["mamba", "linear_attention", "attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": False,
    "eos_token_id": [1, 2],
    "dtype": "bfloat16",
}


def config_seeds():
    seeds = {
        "all_fields": json.dumps(ALL_FIELDS).encode(),
        "generation": json.dumps(HYBRID).encode() + b"\0" + json.dumps({"eos_token_id": [3, 4], "temperature": 0.6}).encode(),
        "wrong_values": json.dumps(HYBRID | {"hidden_act": "gelu", "vocab_size": -1, "mystery": None}).encode(),
        "duplicate": b'{"model_type":"olmo3","model_type":"olmo3"}',
        "tokenizer_byte_level": tokenizer(
            {"type": "ByteLevel"}, {"a": 0, "\u0120b": 1, "\u010a": 3}, [{"id": 4, "content": "<x>", "special": True}]
        ),
        "tokenizer_byte_fallback": tokenizer(FALLBACK, {"<0x0A>": 0, "\u2581a": 1}),
    }
    for i, case in enumerate(json.loads((DATA / "model/rope.json").read_text())["cases"]):
        seeds[f"rope_{i:02d}"] = json.dumps(case["config"]).encode()
    return seeds


def main():
    for target, seeds in (("safetensors", SAFETENSORS), ("config", config_seeds())):
        folder = DATA / "fuzz" / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in seeds.items():
            (folder / name).write_bytes(value)
        print(f"{folder}: {len(seeds)} seeds")


if __name__ == "__main__":
    main()
