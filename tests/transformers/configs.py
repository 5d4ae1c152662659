"""Random small checkpoints, one for each branch of the models Lockstep serves, and their transformers references.

A checkpoint is written as real ones are: weights under the released names (transformers' save_pretrained) or under the
module's own names (fused conv1d, the newer norm names), in one file or in shards, in fp32, fp16 or bf16. Weights are
drawn so that logits spread over several nats and every norm, gate and decay does something: a mistake in any of them
shows.
"""

import dataclasses
import json
import math
import pathlib

import torch
from safetensors.torch import save_file
from transformers import Olmo3Config, Olmo3ForCausalLM, OlmoHybridConfig, OlmoHybridForCausalLM

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
NOPE = {"rope_type": "default", "rope_theta": None}


class AllGdnConfig(OlmoHybridConfig):
    """transformers asks an Olmo Hybrid for at least one attention layer; its modules do not need one."""

    def validate_architecture(self):
        if any(kind != LINEAR for kind in self.layer_types):
            raise ValueError(f"layer_types is {self.layer_types}, want only {LINEAR!r}")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    name: str
    config: dict
    model: type = OlmoHybridForCausalLM
    config_class: type = OlmoHybridConfig
    dtype: torch.dtype = torch.float32  # on disk
    names: str = "released"  # or "module"
    shards: int = 1
    # Fields of config.json that differ from what transformers writes; None: absent.
    config_json: dict = dataclasses.field(default_factory=dict)


def _hybrid(**fields):
    base = dict(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=64,
        max_position_embeddings=2048,
        rope_parameters=dict(NOPE),
        eos_token_id=0,
        pad_token_id=None,
    )
    return base | fields


def _olmo3(**fields):
    base = dict(
        vocab_size=600,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        sliding_window=96,
        layer_types=[SLIDING, SLIDING, SLIDING, FULL],
        eos_token_id=0,
        pad_token_id=None,
    )
    return base | fields


def _yarn(**fields):
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256} | fields


CHECKPOINTS = [
    Checkpoint("nope", _hybrid()),
    Checkpoint(
        "nope_7b_heads",
        _hybrid(
            hidden_size=256,
            num_attention_heads=2,
            linear_key_head_dim=96,
            linear_value_head_dim=192,
            vocab_size=2000,
        ),
        dtype=torch.bfloat16,
    ),
    Checkpoint("rope", _hybrid(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}), names="module"),
    # Without rope_parameters transformers takes RoPE of theta 10,000, not NoPE.
    Checkpoint("rope_by_default", _hybrid(), config_json={"rope_parameters": None}),
    Checkpoint(
        "rope_linear",
        _hybrid(num_key_value_heads=2, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    ),
    Checkpoint(
        "rope_yarn_gqa",
        _hybrid(
            layer_types=[FULL, LINEAR, LINEAR, FULL, LINEAR],
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=1,
            rope_parameters=_yarn(rope_theta=50000.0, beta_fast=16.0, beta_slow=2.0),
        ),
    ),
    Checkpoint(
        "grouped_kv_heads",
        _hybrid(num_attention_heads=8, num_key_value_heads=2, layer_types=[LINEAR, FULL, LINEAR, FULL]),
    ),
    Checkpoint(
        "more_value_heads",
        _hybrid(linear_num_value_heads=6, linear_key_head_dim=24, linear_value_head_dim=40),
    ),
    Checkpoint("no_neg_eigval", _hybrid(linear_allow_neg_eigval=False)),
    Checkpoint("conv_width_3", _hybrid(linear_conv_kernel_dim=3)),
    Checkpoint("tied_fp16", _hybrid(tie_word_embeddings=True), dtype=torch.float16),
    Checkpoint("module_names_bf16", _hybrid(num_key_value_heads=2), dtype=torch.bfloat16, names="module"),
    Checkpoint("sharded_bf16", _hybrid(linear_num_value_heads=4), dtype=torch.bfloat16, shards=3),
    Checkpoint("sharded_fp16_module_names", _hybrid(), dtype=torch.float16, names="module", shards=2),
    Checkpoint(
        "odd_sizes",
        _hybrid(
            vocab_size=997,
            hidden_size=120,
            intermediate_size=200,
            num_attention_heads=5,
            linear_num_key_heads=3,
            linear_num_value_heads=3,
            linear_key_head_dim=40,
            linear_value_head_dim=56,
            layer_types=[FULL, LINEAR, FULL, LINEAR],
            rms_norm_eps=1e-5,
        ),
    ),
    Checkpoint(
        "all_gdn",
        _hybrid(layer_types=[LINEAR] * 4),
        config_class=AllGdnConfig,
    ),
    Checkpoint(
        "olmo3_yarn",
        _olmo3(
            rope_parameters={
                SLIDING: {"rope_type": "default", "rope_theta": 500000.0},
                FULL: _yarn(rope_theta=500000.0, attention_factor=1.2),
            }
        ),
        model=Olmo3ForCausalLM,
        config_class=Olmo3Config,
    ),
    # As the released Olmo 3 files have it: one theta, and rope_scaling for the full-attention layers.
    Checkpoint(
        "olmo3_legacy_rope",
        _olmo3(num_key_value_heads=4, sliding_window=64),
        model=Olmo3ForCausalLM,
        config_class=Olmo3Config,
        dtype=torch.bfloat16,
        config_json={
            "rope_parameters": None,
            "rope_theta": 500000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.2079441541679836,
            },
        },
    ),
]


# Standard deviations, relative to 1 / sqrt(inputs) for matrices. Branches are kept below the residual stream, and
# logits to a spread of 1.5, so that transformers' own fp32 error (against fp64) stays under 1e-5: larger ones amplify
# every rounding, and comparing two fp32 programs would say nothing.
_EMBEDDING, _BRANCH_OUT, _LOGITS = 1.0, 0.5, 1.5


@torch.no_grad()
def _randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter, std, mean=0.0):
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            normal(parameter, _EMBEDDING)
        elif name == "model.norm.weight" and tied:  # the head is the embedding, too large for logits
            scale = _LOGITS / math.sqrt(parameter.shape[0])
            normal(parameter, 0.2 * scale, mean=scale)
        elif name == "lm_head.weight":
            normal(parameter, _LOGITS / math.sqrt(parameter.shape[1]))
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            normal(parameter, _BRANCH_OUT / math.sqrt(parameter.shape[1]))
        elif name.endswith("conv1d.weight"):
            normal(parameter, 0.4)
        elif name.endswith("A_log"):
            parameter.copy_(torch.empty(parameter.shape).uniform_(0.5, 16.0, generator=generator).log())
        elif name.endswith("dt_bias"):
            dt = torch.exp(torch.empty(parameter.shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator))
            parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif parameter.dim() == 1:
            normal(parameter, 0.2, mean=1.0)
        else:
            normal(parameter, 1 / math.sqrt(parameter.shape[1]))


_RELEASED_NAMES = (("input_layernorm", "attention_layer_norm"), ("post_attention_layernorm", "feedforward_layer_norm"))


def _released_tensors(tensors, config):
    """The module's tensors under the names of the released files: separate convolutions, and the GDN layers' old norm
    names.
    """
    released = {}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if layer is not None and config.layer_types[layer] == LINEAR:
            for new, old in _RELEASED_NAMES:
                name = name.replace(new, old)
            if name.endswith(".conv1d.weight"):
                key = config.linear_num_key_heads * config.linear_key_head_dim
                for which, part in zip("qkv", tensor.split([key, key, tensor.shape[0] - 2 * key])):
                    released[name.replace(".conv1d.", f".{which}_conv1d.")] = part.contiguous()
                continue
        released[name] = tensor
    return released


def _write_tensors(directory, tensors, shards):
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write(checkpoint, directory, dtype=None, seed=0):
    """Writes the checkpoint's files into `directory`. dtype: what tensors are stored as, instead of the checkpoint's
    own.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = dtype or checkpoint.dtype
    config = checkpoint.config_class(**checkpoint.config)
    model = checkpoint.model(config)
    _randomize(model, seed)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if checkpoint.names == "released" and checkpoint.model is OlmoHybridForCausalLM:
        tensors = _released_tensors(tensors, config)
    _write_tensors(directory, tensors, checkpoint.shards)
    fields = config.to_dict() | {"architectures": [checkpoint.model.__name__]}
    fields |= {"dtype": str(dtype).removeprefix("torch.")} | checkpoint.config_json
    fields = {name: value for name, value in fields.items() if value is not None or name not in checkpoint.config_json}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def load_reference(checkpoint, directory, dtype):
    """The checkpoint in transformers, as its user would load it: from the directory, in `dtype`."""
    config = checkpoint.config_class.from_pretrained(directory)
    model, info = checkpoint.model.from_pretrained(directory, config=config, dtype=dtype, output_loading_info=True)
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"transformers loaded {directory} with {wrong}")
    return model.eval()


@torch.no_grad()
def reference_logprobs(model, sequences):
    """For each token sequence, the log-probability of every token but the first given those before it: fp32 log_softmax
    of the model's logits, unpadded.
    """
    results = []
    for tokens in sequences:
        if len(tokens) < 2:
            results.append(torch.empty(0))
            continue
        ids = torch.tensor([tokens])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        results.append(torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0])
    return results


def random_sequences(vocab_size, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
