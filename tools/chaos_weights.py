"""The versions of a chaos campaign: the tiny checkpoint's bf16 values with noise drawn from (seed, version) alone, so
that the learner, however often it is restarted, and the reference all have the same.
"""

import json
import pathlib
import shutil

import numpy as np

TINY = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "tiny"
NOISE_BITS = 3  # of the 7 of a bf16 mantissa: up to 6% of a value, and all stay finite


class Versions:
    def __init__(self, seed, model=TINY):
        self.seed, self.model = seed, pathlib.Path(model)
        raw = (self.model / "model.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        self.header_size, self.header = 8 + size, header
        self.names = list(header)
        self.raw = np.frombuffer(raw, np.uint8)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} is {entry['dtype']}; the campaign's weights are made of BF16")

    def shape(self, name):
        return tuple(self.header[name]["shape"])

    def bits(self, version):
        """uint16 values of every tensor, by name. (0, 0): the checkpoint's own."""
        epoch, step = version
        rng = None if (epoch, step) == (0, 0) else np.random.Generator(np.random.PCG64([self.seed, epoch, step]))
        result = {}
        for name in self.names:
            begin, end = (self.header_size + offset for offset in self.header[name]["data_offsets"])
            values = self.raw[begin:end].view("<u2").copy()
            if rng is not None:
                values ^= rng.integers(0, 1 << NOISE_BITS, values.size, np.uint16)
            result[name] = values.reshape(self.shape(name))
        return result

    def manifest(self):
        return [(name, "float32", self.shape(name)) for name in self.names]

    def tensors(self, version):
        """(name, float32 array): what an fp32 master would send; rounding to bf16 gives bits(version) back."""
        return [(name, widen(values)) for name, values in self.bits(version).items()]

    def write(self, version, directory):
        """A checkpoint of that version."""
        directory.mkdir(parents=True, exist_ok=True)
        for file in self.model.iterdir():
            if file.suffix != ".safetensors" and file.is_file():
                shutil.copy(file, directory)
        out = self.raw.copy()
        for name, values in self.bits(version).items():
            begin, end = (self.header_size + offset for offset in self.header[name]["data_offsets"])
            out[begin:end] = values.reshape(-1).view(np.uint8)
        (directory / "model.safetensors").write_bytes(out.tobytes())
        return directory


def widen(values):
    """bf16 bits to float32."""
    return (values.astype("<u4") << 16).view("<f4")
