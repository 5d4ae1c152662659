#!/usr/bin/env python3
"""Writes a Hugging Face directory with random weights in the shape of a released model, for checks and benchmarks that
need its sizes and not its knowledge.

    tools/make_random_checkpoint.py --preset olmo-hybrid-7b --out /dev/shm/olmo-hybrid-7b
    tools/make_random_checkpoint.py --preset olmo3-7b --layers 2 --out /tmp/olmo3-2-layers

Initial values are those of transformers' `_from_config` (distribution and dtype of every tensor); bf16, in shards. A
tensor's values depend on the seed, its name and the kind of device alone, so a cut by --layers has the whole model's
first layers. Needs torch and transformers; no tokenizer is written.
"""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import sys
import time
import zlib

SHARD_BYTES = 1 << 30

# transformers' defaults; NoPE is rope_theta null, as in the released checkpoint.
OLMO_HYBRID_7B = {"rope_parameters": {"rope_type": "default", "rope_theta": None}}

# The released config.json; transformers' own defaults are those of a smaller, older model.
OLMO3_7B = {
    "vocab_size": 100278,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 100277,
    "eos_token_id": 100257,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    },
}


def make_config(preset, layers=None):
    """(config, model class) of a preset, cut to its first `layers` layers."""
    from transformers import Olmo3Config, Olmo3ForCausalLM, OlmoHybridConfig, OlmoHybridForCausalLM

    config_class, model_class, fields = {
        "olmo-hybrid-7b": (OlmoHybridConfig, OlmoHybridForCausalLM, OLMO_HYBRID_7B),
        "olmo3-7b": (Olmo3Config, Olmo3ForCausalLM, OLMO3_7B),
    }[preset]
    # Both classes change the dictionaries they are given.
    fields = json.loads(json.dumps(fields))
    cut = {} if layers is None else {"num_hidden_layers": layers}
    return config_class(**fields, **cut), model_class


PRESETS = ("olmo-hybrid-7b", "olmo3-7b")


def parameter_shapes(config, model_class):
    """{name: (shape, dtype)} of the model in bf16, from its modules on no device."""
    import torch

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = model_class(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


def make_tensor(name, shape, dtype, config, seed, device):
    """The tensor's initial values, by the rules of transformers' `_init_weights`."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed << 32 | zlib.crc32(name.encode()))
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if name.endswith("A_log"):
        return tensor.uniform_(config.linear_a_log_min, config.linear_a_log_max, generator=generator).log_()
    if name.endswith("dt_bias"):
        low, high = math.log(config.linear_dt_min), math.log(config.linear_dt_max)
        dt = torch.exp(tensor.uniform_(0, 1, generator=generator) * (high - low) + low)
        dt = torch.clamp(dt, min=config.linear_dt_init_floor)
        return dt + torch.log(-torch.expm1(-dt))
    if len(shape) == 1:
        return tensor.fill_(1)  # norms
    tensor.normal_(0.0, config.initializer_range, generator=generator)
    if name == "model.embed_tokens.weight" and config.pad_token_id is not None:
        tensor[config.pad_token_id] = 0
    return tensor


def plan_shards(shapes, limit=SHARD_BYTES):
    """Lists of names: consecutive tensors of at most `limit` bytes together (a larger tensor has its own)."""
    shards, size = [[]], 0
    for name, (shape, dtype) in shapes.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def write_shard(path, names, shapes, make):
    """One safetensors file, tensor by tensor: `make(name)` gives each, on any device."""
    import torch

    dtype_names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        shape, dtype = shapes[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = memoryview(make(name).contiguous().cpu().view(-1).view(torch.uint8).numpy())
            while data:  # one write call moves 2 GiB at most
                data = data[file.write(data) :]
    return offset


def write_checkpoint(directory, preset, layers=None, seed=0, device=None, threads=None):
    """Writes the directory; returns the bytes of its tensors."""
    import torch
    import transformers

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config, model_class = make_config(preset, layers)
    shapes = parameter_shapes(config, model_class)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.safetensors*"):
        old.unlink()

    shards = plan_shards(shapes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    threads = threads or os.cpu_count()
    if device == "cpu":
        torch.set_num_threads(1)  # the shards are the parallelism

    def write(index):
        return write_shard(
            directory / files[index],
            shards[index],
            shapes,
            lambda name: make_tensor(name, *shapes[name], config, seed, device),
        )

    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        total = sum(executor.map(write, range(len(shards))))
    weight_map = {name: file for file, names in zip(files, shards) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    fields = config.to_dict() | {
        "architectures": [model_class.__name__],
        "dtype": "bfloat16",
        "transformers_version": transformers.__version__,
    }
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--layers", type=int, help="only the first layers (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where values are drawn (default: cuda if there)")
    parser.add_argument("--threads", type=int, help="files written at once (default: one per core)")
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers < 1:
        parser.error(f"--layers {arguments.layers}, want 1 or more")
    begin = time.perf_counter()
    total = write_checkpoint(
        arguments.out, arguments.preset, arguments.layers, arguments.seed, arguments.device, arguments.threads
    )
    seconds = time.perf_counter() - begin
    print(f"{arguments.out}: {total / 1e9:.2f} GB in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
