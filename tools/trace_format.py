"""A trace: the rows that a forward pass computes at chosen positions, operation by operation. docs/trace.md defines it.
Needs numpy alone.
"""

import dataclasses
import json
import pathlib

import numpy

FORMAT = 1
# bf16 as its bits: numpy has no such type.
DTYPES = {"bf16": numpy.uint16, "f32": numpy.float32}

BEFORE_LAYERS = ("embed",)
GDN_LAYER = ("input_norm", "qkv_g", "ab", "conv", "conv_v", "qk_l2", "beta", "g", "gdn_out", "gated_norm", "mixer_out")
GDN_LAYER += ("residual_mid", "mlp_norm", "gate_up", "swiglu", "mlp_out", "residual")
ATTENTION_LAYER = ("qkv", "q_norm", "k_norm", "rope_q", "rope_k", "attn_out", "mixer_out", "mixer_norm")
ATTENTION_LAYER += ("residual_mid", "gate_up", "swiglu", "mlp_out", "mlp_norm", "residual")
AFTER_LAYERS = ("final_norm", "logits")

# Order of the columns of fused operations.
PARTS = {
    "qkv_g": ("q", "k", "v", "g"),
    "ab": ("a", "b"),
    "conv": ("q", "k", "v"),
    "qk_l2": ("q", "k"),
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
}


@dataclasses.dataclass
class Tensor:
    layer: int  # -1 outside the layers
    name: str
    dtype: str  # a key of DTYPES
    positions: list
    rows: numpy.ndarray  # [positions, width]
    parts: list  # [[name, width], ...] of fused columns; empty for one part

    @property
    def width(self):
        return self.rows.shape[1]

    def values(self):
        """fp32, exactly."""
        if self.dtype == "f32":
            return self.rows
        return (self.rows.astype(numpy.uint32) << 16).view(numpy.float32)

    def part(self, column):
        """Column `column`, named within its part: "k[17]"."""
        begin = 0
        for name, width in self.parts:
            if column < begin + width:
                return f"{name}[{column - begin}]"
            begin += width
        return f"[{column}]"


def write(directory, tokens, tensors, source):
    """tensors: in the order of computation."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    index = []
    for order, tensor in enumerate(tensors):
        file = f"{order:04d}_{'' if tensor.layer < 0 else f'layer{tensor.layer}_'}{tensor.name}.bin"
        rows = numpy.ascontiguousarray(tensor.rows, DTYPES[tensor.dtype])
        (directory / file).write_bytes(rows.tobytes())
        entry = {"layer": tensor.layer, "order": order, "name": tensor.name, "dtype": tensor.dtype}
        entry |= {"width": tensor.width, "positions": list(tensor.positions), "file": file}
        if tensor.parts:
            entry["parts"] = tensor.parts
        index.append(entry)
    trace = {"format": FORMAT, "source": source, "tokens": list(tokens), "tensors": index}
    (directory / "index.json").write_text(json.dumps(trace) + "\n")


def read(directory):
    """(tokens, source, tensors in order)."""
    directory = pathlib.Path(directory)
    trace = json.loads((directory / "index.json").read_text())
    if trace.get("format") != FORMAT:
        raise ValueError(f"{directory}: format {trace.get('format')}, want {FORMAT}")
    tensors = []
    for entry in sorted(trace["tensors"], key=lambda entry: entry["order"]):
        path = directory / entry["file"]
        rows = numpy.fromfile(path, DTYPES[entry["dtype"]])
        shape = (len(entry["positions"]), entry["width"])
        if rows.size != shape[0] * shape[1]:
            raise ValueError(f"{path}: {rows.size} elements, want {shape[0]} x {shape[1]}")
        tensors.append(
            Tensor(
                entry["layer"],
                entry["name"],
                entry["dtype"],
                entry["positions"],
                rows.reshape(shape),
                entry.get("parts", []),
            )
        )
    return trace["tokens"], trace.get("source", ""), tensors
