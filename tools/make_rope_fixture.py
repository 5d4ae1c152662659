#!/usr/bin/env python3
"""Writes tests/data/model/rope.json: configs, and the rotary frequencies transformers gives each layer of them.

Needs torch and transformers (made with torch 2.13.0, transformers 5.17.0). rope_test.cc compares ParseModelSpec's numbers with these.
"""

import argparse
import copy
import json
import pathlib

import torch
import transformers
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridRotaryEmbedding

HYBRID = {
    "model_type": "olmo_hybrid",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OLMO3 = HYBRID | {"model_type": "olmo3"}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}

CASES = {
    "hybrid: nothing said": HYBRID,
    "hybrid: rope_parameters null": HYBRID | {"rope_parameters": None},
    "hybrid: NoPE as converted checkpoints write it": HYBRID | {"rope_parameters": None, "rope_theta": None},
    "hybrid: NoPE as save_pretrained writes it": HYBRID | {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
    "hybrid: theta at the top": HYBRID | {"rope_theta": 500000},
    "hybrid: theta inside": HYBRID | {"rope_parameters": {"rope_theta": 123456.7}},
    "hybrid: head 128": HYBRID | {"hidden_size": 1024, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
    "hybrid: head_dim given": HYBRID | {"head_dim": 80, "rope_theta": 1e6},
    "hybrid: linear": HYBRID | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 3.0}},
    "hybrid: legacy linear": HYBRID | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "hybrid: yarn": HYBRID | {"rope_parameters": YARN | {"rope_theta": 500000.0}},
    "hybrid: yarn, head 128": HYBRID | {"hidden_size": 1024, "rope_parameters": YARN | {"rope_theta": 500000.0}},
    "hybrid: yarn, original length not said": HYBRID | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "hybrid: yarn, factor null": HYBRID
    | {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}},
    "hybrid: yarn, not truncated": HYBRID | {"rope_parameters": YARN | {"rope_theta": 10000.0, "truncate": False}},
    "hybrid: yarn, all said": HYBRID
    | {
        "rope_parameters": YARN
        | {"rope_theta": 20000.0, "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": True}
    },
    "hybrid: yarn, mscale": HYBRID | {"rope_parameters": YARN | {"rope_theta": 10000.0, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "hybrid: yarn, bounds meet": HYBRID
    | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2, "rope_theta": 1e4}},
    "olmo3: nothing said": OLMO3,
    "olmo3: theta at the top": OLMO3 | {"rope_theta": 500000, "rope_scaling": None},
    "olmo3: another theta at the top": OLMO3 | {"rope_theta": 10000.0},
    "olmo3: legacy yarn, as released": OLMO3
    | {
        "hidden_size": 1024,
        "rope_theta": 500000,
        "rope_scaling": YARN | {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0},
    },
    "olmo3: per layer type": OLMO3
    | {
        "rope_parameters": {
            "full_attention": YARN | {"rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "olmo3: one layer type, null for the other": OLMO3
    | {"rope_theta": 7000.0, "rope_parameters": {"full_attention": None, "sliding_attention": {"type": "linear", "factor": 4.0}}},
    "olmo3: full attention only": OLMO3 | {"layer_types": ["full_attention"] * 4, "rope_theta": 1e5},
}


def tensor_case(inv_freq, scaling):
    return {"inv_freq": [float(x) for x in inv_freq.to(torch.float32)], "attention_scaling": float(torch.tensor(scaling, dtype=torch.float32))}


def layers(config_dict):
    config = transformers.AutoConfig.for_model(**copy.deepcopy(config_dict))
    out = []
    if config_dict["model_type"] == "olmo_hybrid":
        has_rope = config.rope_parameters is not None and config.rope_parameters.get("rope_theta") is not None
        rope = OlmoHybridRotaryEmbedding(config) if has_rope else None
        for layer_type in config.layer_types:
            used = layer_type == "full_attention" and rope is not None
            out.append(tensor_case(rope.inv_freq, rope.attention_scaling) if used else None)
        return out
    rope = Olmo3RotaryEmbedding(config)
    for layer_type in config.layer_types:
        out.append(tensor_case(getattr(rope, f"{layer_type}_inv_freq"), getattr(rope, f"{layer_type}_attention_scaling")))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    default = pathlib.Path(__file__).resolve().parent.parent / "tests/data/model/rope.json"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    args = parser.parse_args()
    cases = []
    for name, config in CASES.items():
        by_layer = layers(config)
        # Layers repeat; each distinct set is written once.
        sets = []
        for layer in by_layer:
            if layer not in sets:
                sets.append(layer)
        cases.append({"name": name, "config": config, "sets": sets, "layers": [sets.index(layer) for layer in by_layer]})
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = ",\n".join(json.dumps(case) for case in cases)
    args.output.write_text(f'{{"made_with": {json.dumps(made_with)}, "cases": [\n{text}\n]}}\n')
    print(f"{args.output}: {len(cases)} cases")


if __name__ == "__main__":
    main()
