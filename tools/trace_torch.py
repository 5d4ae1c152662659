#!/usr/bin/env python3
"""Dumps the rows that transformers computes for one sequence, operation by operation, in the format of docs/trace.md.

    tools/trace_torch.py --model DIR --tokens 5,17,3 --positions 0-2 --out /tmp/trace-torch
    tools/trace_torch.py --model DIR --tokens tokens.json --positions 0,63,64,511 --mode nosplit --out DIR

tools/trace_compare.py then names the first operation and row that differ from a worker's dump of the same tokens.
"""

import argparse
import contextlib
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
sys.path.insert(0, str(ROOT / "tools"))

import numpy  # noqa: E402
import torch  # noqa: E402
import trace_format  # noqa: E402
import trainer  # noqa: E402


# Norms whose outputs only linear layers read. Under autocast these are fp32 and cast by every reader: kept as read.
LINEAR_INPUTS = ("input_norm", "mlp_norm", "final_norm")


class Recorder:
    """Keeps rows of a model's tensors while it runs: `with Recorder(model, positions) as r: model(...)`."""

    def __init__(self, model, positions):
        self.model = model
        self.positions = positions
        self._autocast = trainer.is_autocast(model)
        self._index = torch.tensor(positions, device=model.device)
        self._rows = {}  # (layer, name, part) -> (dtype, rows)
        self._layer = -1
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self._hook_outside()
        for number, layer in enumerate(self.model.model.layers):
            self._hook_layer(number, layer)
        if any(hasattr(layer, "linear_attn") for layer in self.model.model.layers):
            self._wrap_delta_rule()
        self._wrap_attention()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def keep(self, layer, name, tensor, part=""):
        """tensor: [1, T, ...]."""
        if self._autocast and name in LINEAR_INPUTS:
            tensor = tensor.bfloat16()
        rows = tensor.detach()[0].index_select(0, self._index).flatten(1).cpu().contiguous()
        if rows.dtype == torch.bfloat16:
            value = "bf16", rows.view(torch.int16).numpy().view(numpy.uint16)
        elif rows.dtype == torch.float32:
            value = "f32", rows.numpy()
        else:
            raise TypeError(f"layer {layer} {name}: {rows.dtype}")
        self._rows[layer, name, part] = value

    def tensors(self):
        """In the order of computation."""
        result = []
        self._collect(result, -1, trace_format.BEFORE_LAYERS)
        for number, layer in enumerate(self.model.model.layers):
            names = trace_format.GDN_LAYER if hasattr(layer, "linear_attn") else trace_format.ATTENTION_LAYER
            self._collect(result, number, names)
        self._collect(result, -1, trace_format.AFTER_LAYERS)
        return result

    def _collect(self, result, layer, names):
        for name in names:
            parts = trace_format.PARTS.get(name, ("",))
            if (layer, name, parts[0]) not in self._rows:
                continue
            pieces = [self._rows[layer, name, part] for part in parts]
            rows = numpy.concatenate([piece for _, piece in pieces], 1)
            widths = [[part, piece.shape[1]] for part, (_, piece) in zip(parts, pieces)] if len(parts) > 1 else []
            result.append(trace_format.Tensor(layer, name, pieces[0][0], self.positions, rows, widths))

    def _output(self, module, layer, name, part=""):
        def hook(_, inputs, output):
            self.keep(layer, name, output[0] if isinstance(output, tuple) else output, part)

        self._stack.callback(module.register_forward_hook(hook).remove)

    def _input(self, module, layer, name):
        def hook(_, args, kwargs):
            self.keep(layer, name, args[0] if args else kwargs["hidden_states"])

        self._stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _hook_outside(self):
        self._output(self.model.model.embed_tokens, -1, "embed")
        self._output(self.model.model.norm, -1, "final_norm")
        self._output(self.model.lm_head, -1, "logits")

    def _hook_layer(self, number, layer):
        def enter(*_):
            self._layer = number

        self._stack.callback(layer.register_forward_pre_hook(enter).remove)
        if hasattr(layer, "linear_attn"):
            self._hook_gdn(number, layer)
        else:
            self._hook_attention(number, layer)
        self._output(layer.mlp.gate_proj, number, "gate_up", "gate")
        self._output(layer.mlp.up_proj, number, "gate_up", "up")
        self._input(layer.mlp.down_proj, number, "swiglu")
        self._output(layer.mlp.down_proj, number, "mlp_out")
        self._output(layer, number, "residual")

    def _hook_gdn(self, number, layer):
        mixer = layer.linear_attn
        self._output(layer.input_layernorm, number, "input_norm")
        for part in "qkvg":
            self._output(getattr(mixer, f"{part}_proj"), number, "qkv_g", part)
        for part in "ab":
            self._output(getattr(mixer, f"{part}_proj"), number, "ab", part)

        def gated_norm(_, inputs, output):
            self.keep(number, "gated_norm", output.reshape(1, -1, mixer.value_dim))

        self._stack.callback(mixer.o_norm.register_forward_hook(gated_norm).remove)
        self._output(mixer.o_proj, number, "mixer_out")
        self._input(layer.post_attention_layernorm, number, "residual_mid")
        self._output(layer.post_attention_layernorm, number, "mlp_norm")

    def _hook_attention(self, number, layer):
        mixer = layer.self_attn
        for part in "qkv":
            self._output(getattr(mixer, f"{part}_proj"), number, "qkv", part)
        self._output(mixer.q_norm, number, "q_norm")
        self._output(mixer.k_norm, number, "k_norm")
        self._input(mixer.o_proj, number, "attn_out")
        self._output(mixer.o_proj, number, "mixer_out")
        self._output(layer.post_attention_layernorm, number, "mixer_norm")
        self._input(layer.mlp, number, "residual_mid")
        self._output(layer.post_feedforward_layernorm, number, "mlp_norm")

    def _wrap_delta_rule(self):
        """conv, qk_l2, beta, g and gdn_out, around the function that the recurrent layers call."""
        from transformers.models.olmo_hybrid import modeling_olmo_hybrid as modeling

        function = modeling.torch_chunk_gated_delta_rule
        fla = trainer.gdn_kernel(self.model).startswith("fla.")

        def recording(q, k, v, *, g, beta, **kwargs):
            number = self._layer
            mixer = self.model.model.layers[number].linear_attn
            repeats = mixer.num_v_heads // mixer.num_k_heads
            heads = {"q": q[:, :, ::repeats], "k": k[:, :, ::repeats], "v": v}
            for part, tensor in heads.items():
                self.keep(number, "conv", tensor, part)
            self.keep(number, "conv_v", v)
            if fla:
                from fla.modules.l2norm import l2norm_fwd

                for part in "qk":
                    self.keep(number, "qk_l2", l2norm_fwd(heads[part].contiguous())[0], part)
            self.keep(number, "beta", beta)
            self.keep(number, "g", g)
            output = function(q, k, v, g=g, beta=beta, **kwargs)
            self.keep(number, "gdn_out", output[0])
            return output

        modeling.torch_chunk_gated_delta_rule = recording
        self._stack.callback(setattr, modeling, "torch_chunk_gated_delta_rule", function)

    def _wrap_attention(self):
        """rope_q and rope_k, of models with RoPE."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.model.model.rotary_emb is None:
            return
        name = self.model.config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS[name]

        def recording(module, query, key, *args, **kwargs):
            self.keep(self._layer, "rope_q", query.transpose(1, 2))
            self.keep(self._layer, "rope_k", key.transpose(1, 2))
            return function(module, query, key, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS[name] = recording
        self._stack.callback(ALL_ATTENTION_FUNCTIONS.__setitem__, name, function)


@torch.no_grad()
def trace(model, tokens, positions):
    """The rows of `positions` in one forward pass over `tokens`, in order."""
    with Recorder(model, positions) as recorder:
        model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    tensors = recorder.tensors()
    names = {(tensor.layer, tensor.name) for tensor in tensors}
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer, "linear_attn") and (number, "gdn_out") not in names:
            raise RuntimeError(f"layer {number}: transformers called another delta rule than the one recorded")
    return tensors


def parse_positions(text, length):
    """"0,63-65" -> [0, 63, 64, 65]"""
    positions = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        positions.extend(range(int(first), int(last or first) + 1))
    if not positions or min(positions) < 0 or max(positions) >= length:
        raise ValueError(f"positions {text!r}, want some of 0 to {length - 1}")
    return sorted(set(positions))


def parse_tokens(text):
    """Ids separated by commas, or the name of a .json file with a list of them."""
    if text.endswith(".json"):
        return json.loads(pathlib.Path(text).read_text())
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help="ids separated by commas, or a .json file")
    parser.add_argument("--positions", help="e.g. 0,63-65 (default: all)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--mode", choices=trainer.MODES, default="nosplit", help="default: nosplit")
    parser.add_argument("--attention", choices=trainer.ATTENTION, default="cudnn", help="default: cudnn")
    parser.add_argument("--autocast", action="store_true", help="fp32 weights under autocast to bf16")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokens = parse_tokens(arguments.tokens)
    positions = parse_positions(arguments.positions or f"0-{len(tokens) - 1}", len(tokens))
    if device == "cuda":
        trainer.pin_fla_configurations()
    model = trainer.load(arguments.model, device, getattr(torch, arguments.dtype), arguments.autocast)
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(trainer.blas_mode(arguments.mode))
            stack.enter_context(trainer.attention_backend(arguments.attention))
        tensors = trace(model, tokens, positions)
    dtype = "autocast" if arguments.autocast else arguments.dtype
    source = f"transformers, {dtype} on {device}, {arguments.mode}, {arguments.attention}"
    trace_format.write(arguments.out, tokens, tensors, source)
    print(f"{arguments.out}: {len(tensors)} operations at {len(positions)} positions")


if __name__ == "__main__":
    main()
