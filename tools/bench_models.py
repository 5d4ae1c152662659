"""The checkpoints that tools/bench_cpu runs, and how many bytes their decode steps must move."""

import dataclasses
import json
import pathlib

# A random Olmo Hybrid of 379 M parameters: the 7B's head sizes, eight heads, three recurrent layers to one of
# attention.
RANDOM_350M = dict(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=24,
    num_attention_heads=8,
    linear_num_key_heads=8,
    linear_num_value_heads=8,
    linear_key_head_dim=96,
    linear_value_head_dim=192,
    max_position_embeddings=65536,
    rope_parameters={"rope_type": "default", "rope_theta": None},
    tie_word_embeddings=True,
    eos_token_id=0,
    pad_token_id=1,
)


def write_random_350m(directory):
    """Writes the model unless it stands there already. Random weights in bf16; the seed is fixed."""
    directory = pathlib.Path(directory)
    if (directory / "done").exists():
        return directory
    import torch
    from transformers import GenerationConfig, OlmoHybridConfig, OlmoHybridForCausalLM

    torch.manual_seed(0)
    model = OlmoHybridForCausalLM(OlmoHybridConfig(**RANDOM_350M)).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    model.save_pretrained(directory)
    (directory / "done").touch()
    return directory


def write_all_gdn(directory, tiny):
    """The tiny checkpoint without its attention layers: what is left is recurrent, and should take the same time per
    token at any length.
    """
    directory = pathlib.Path(directory)
    from safetensors.torch import load_file, save_file

    config = json.loads((pathlib.Path(tiny) / "config.json").read_text())
    kept = [i for i, kind in enumerate(config["layer_types"]) if kind == "linear_attention"]
    tensors = {}
    for name, tensor in load_file(pathlib.Path(tiny) / "model.safetensors").items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        tensors[".".join(parts)] = tensor
    config |= {"layer_types": ["linear_attention"] * len(kept), "num_hidden_layers": len(kept)}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """What one decode step must read from memory at least: every weight once, and per sequence its state, open chunk
    and cached keys and values.
    """

    weights: int
    state: int  # per sequence: FP32 S; it is written back only once in 64 steps
    chunk_row: int  # per sequence and row of the open chunk: k in bf16, u, w and v' in FP32
    kv_row: int  # per sequence and token of context: keys and values in bf16

    def of(self, sequences, context):
        """Bytes of a step at this context; 31.5 rows of an open chunk on average, and 1/64 of a state written back."""
        return self.weights + sequences * (self.state * (1 + 1 / 64) + 31.5 * self.chunk_row + context * self.kv_row)


def step_bytes(config_json):
    """From config.json's fields, for a bf16 checkpoint under the profile hf-torch (recurrent state in fp32)."""
    c = config_json
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    kv_width = c["num_key_value_heads"] * (hidden // heads)
    recurrent = c["layer_types"].count("linear_attention")
    attention = c["layer_types"].count("full_attention")
    key_width = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    value_heads = c["linear_num_value_heads"]
    value_width = value_heads * c["linear_value_head_dim"]
    gdn_weights = hidden * (2 * key_width + 3 * value_width + 2 * value_heads)  # q, k; v, g, o; a, b
    attention_weights = 2 * hidden * (hidden + kv_width)  # q, o; k, v
    mlp_weights = 3 * hidden * c["intermediate_size"]
    head = hidden * c["vocab_size"]
    matrices = recurrent * (gdn_weights + mlp_weights) + attention * (attention_weights + mlp_weights) + head
    return StepBytes(
        weights=2 * matrices,
        state=4 * recurrent * value_heads * c["linear_key_head_dim"] * c["linear_value_head_dim"],
        chunk_row=recurrent * (2 * key_width + 4 * (value_heads * c["linear_key_head_dim"] + 2 * value_width)),
        kv_row=2 * attention * 2 * kv_width,
    )
