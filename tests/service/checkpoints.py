"""Checkpoints for tests, as bytes: no library, no rounding."""

import json
import random
import shutil


def read(directory):
    """model.safetensors as {name: (dtype as the file has it, shape, bytes)}."""
    raw = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    data = raw[8 + size :]
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def write(directory, tensors, like):
    """A checkpoint with these tensors and the other files of the checkpoint `like`."""
    directory.mkdir()
    for file in like.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, directory)
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / "model.safetensors", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            out.write(data)


def perturb(tensors, seed):
    """The same tensors with some low bits of their mantissas flipped: other weights of the same sizes, all finite."""
    rng = random.Random(seed)
    changed = {}
    for name, (dtype, shape, data) in tensors.items():
        width = 4 if dtype == "F32" else 2
        # The lowest byte of a little-endian value holds mantissa bits alone in F32; in BF16 all but its highest bit.
        mask = bytes([0x3F]) + bytes(width - 1)
        noise = int.from_bytes(rng.randbytes(len(data)), "little") & int.from_bytes(mask * (len(data) // width), "little")
        changed[name] = (dtype, shape, (int.from_bytes(data, "little") ^ noise).to_bytes(len(data), "little"))
    return changed
