"""The device sampler's log-probabilities beside torch.log_softmax's, bit for bit, and its times.

Needs a Hopper GPU, torch and liblockstep_cuda.so (argument 1). Exit code 1 if any bit differs. --no-times: bits only.
TEMPERATURE is compared with logits / T twice: T a Python number (PyTorch multiplies by 1 / T) and T a tensor (it
divides), and with bf16 logits / T rounded to bf16. Rows are 16-byte aligned on both sides.
"""

import ctypes
import sys
import time

import torch

DIVIDE, RECIPROCAL, RECIPROCAL_BF16 = 0, 1, 2
VOCABS = (100352, 100278, 256, 1000, 1536, 2048, 2049, 9216, 9217, 10000, 12252, 12256, 50304, 17, 1)
TEMPERATURES = (1.0, 0.7, 1.3)
ROWS = 24


class Library:
    def __init__(self, path):
        self.c = ctypes.CDLL(path)
        p, l, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
        self.c.lockstep_last_error.restype = ctypes.c_char_p
        self.c.lockstep_sampler_create.restype = p
        self.c.lockstep_sampler_create.argtypes = [l, ctypes.c_int, p]
        self.c.lockstep_sampler_destroy.argtypes = [p]
        self.c.lockstep_sampler_set.argtypes = [p, f, i, f, f, ctypes.c_int]
        self.c.lockstep_sampler_enqueue.argtypes = [p, p, ctypes.c_int, l, l, l, p, ctypes.c_uint64]
        self.c.lockstep_sampler_collect.argtypes = [p, p, p, p]


class Sampler:
    def __init__(self, library, vocab, rounding):
        self.c, self.vocab, self.rows = library.c, vocab, 0
        self.error = library.c.lockstep_last_error
        self.handle = self.c.lockstep_sampler_create(vocab, rounding, torch.cuda.current_stream().cuda_stream)
        if not self.handle:
            raise RuntimeError(self.error().decode())

    def close(self):
        self.c.lockstep_sampler_destroy(self.handle)

    def set(self, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=True):
        self.c.lockstep_sampler_set(self.handle, temperature, top_k, top_p, min_p, int(logprobs))

    def enqueue(self, logits, forced=None, seed=1):
        """logits: [rows, vocab] with aligned rows; forced: int32 on the host."""
        self.rows += logits.shape[0]
        self.c.lockstep_sampler_enqueue(
            self.handle, logits.data_ptr(), int(logits.dtype == torch.float32), logits.shape[0], self.vocab,
            logits.stride(0), None if forced is None else forced.data_ptr(), seed)

    def collect(self):
        tokens = torch.full((self.rows,), -1, dtype=torch.int32)
        raw, temperature = torch.full((self.rows,), 7.0), torch.full((self.rows,), 7.0)
        self.rows = 0
        if self.c.lockstep_sampler_collect(self.handle, tokens.data_ptr(), raw.data_ptr(), temperature.data_ptr()):
            raise RuntimeError(self.error().decode())
        return tokens, raw, temperature


def aligned(rows, vocab, dtype, scale):
    stride = (vocab + 7) // 8 * 8
    logits = torch.full((rows, stride), float("nan"), device="cuda", dtype=dtype)[:, :vocab]
    logits.copy_(torch.randn(rows, vocab, device="cuda") * scale)
    return logits


def log_softmax(y, tokens):
    """Row by row: a freshly allocated row is aligned, whatever the width."""
    rows = [torch.log_softmax(y[r].clone()[None], -1)[0, int(tokens[r])] for r in range(y.shape[0])]
    return torch.stack(rows).cpu()


def differing(got, want):
    return int((got.view(torch.int32) != want.view(torch.int32)).sum())


def check_bits(library):
    failed = compared = 0
    for vocab in VOCABS:
        line = []
        for dtype in (torch.bfloat16, torch.float32):
            logits = aligned(ROWS, vocab, dtype, 3.0)
            x = logits.float()
            tokens = torch.randint(vocab, (ROWS,), dtype=torch.int32)
            for temperature in TEMPERATURES:
                ways = {DIVIDE: x / torch.tensor(temperature, device="cuda"), RECIPROCAL: x / temperature}
                if dtype == torch.bfloat16:
                    ways[RECIPROCAL_BF16] = (logits / temperature).float()
                for rounding, y in ways.items():
                    sampler = Sampler(library, vocab, rounding)
                    sampler.set(temperature=temperature)
                    sampler.enqueue(logits, tokens)
                    _, raw, scaled = sampler.collect()
                    sampler.enqueue(logits)
                    drawn, drawn_raw, drawn_scaled = sampler.collect()
                    sampler.close()
                    wrong = 0
                    for got_raw, got_scaled, t in ((raw, scaled, tokens), (drawn_raw, drawn_scaled, drawn)):
                        wrong += differing(got_raw, log_softmax(x, t)) + differing(got_scaled, log_softmax(y, t))
                        compared += 2 * ROWS
                    failed += wrong
                    if wrong:
                        want = log_softmax(y, tokens)
                        r = int((scaled.view(torch.int32) != want.view(torch.int32)).float().argmax())
                        line.append(f"{dtype} T {temperature} rounding {rounding}: {wrong} differ, row {r} token "
                                    f"{int(tokens[r])}: {scaled[r].item()!r}, torch {want[r].item()!r}")
        print(f"vocab {vocab:6}: {'equal' if not line else line[0] + f' (+{len(line) - 1} more)'}", flush=True)
    print(f"{compared} log-probabilities, {failed} differ", flush=True)
    return failed == 0


def time_stream(function, repeat=20):
    """Least time on the stream of one call, us."""
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(400_000)  # the host is ahead of the stream
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return min(times)


def print_times(library):
    vocab = 100352
    print("us, stream time of an Enqueue with its copies; in brackets median wall time of Enqueue + Collect", flush=True)
    for rows in (1, 8, 32, 128, 256):
        logits = aligned(rows, vocab, torch.bfloat16, 3.0)
        forced = torch.zeros(rows, dtype=torch.int32)
        sampler = Sampler(library, vocab, RECIPROCAL)
        cells = []
        for name, options, tokens in (
                ("draw", dict(logprobs=False), None), ("greedy", dict(temperature=0.0, logprobs=False), None),
                ("draw+raw", dict(), None), ("T=0.7+both", dict(temperature=0.7), None), ("score", dict(), forced),
                ("top_p .9", dict(top_p=0.9), None), ("top_k 50", dict(top_k=50), None),
                ("k50 p.9 minp", dict(top_k=50, top_p=0.9, min_p=0.01), None)):
            sampler.set(**options)
            sampler.enqueue(logits, tokens)
            sampler.collect()

            def step():
                sampler.enqueue(logits, tokens)

            walls = []
            for _ in range(30):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                step()
                sampler.collect()
                walls.append((time.perf_counter() - begin) * 1e6)

            stream = time_stream(step, 6)
            sampler.collect()
            cells.append(f"{name} {stream:.0f} ({sorted(walls)[len(walls) // 2]:.0f})")
        sampler.close()
        x = logits.float()
        peer = time_stream(lambda: torch.log_softmax(x, -1))
        multinomial = time_stream(lambda: torch.multinomial(torch.softmax(x, -1), 1))
        print(f"{rows:4} rows: " + "  ".join(cells) + f" | torch log_softmax {peer:.0f}, softmax + multinomial "
              f"{multinomial:.0f}", flush=True)


def main():
    library = Library(sys.argv[1])
    torch.manual_seed(0)
    print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    ok = check_bits(library)
    if "--no-times" not in sys.argv:
        print_times(library)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
