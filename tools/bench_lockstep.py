"""A worker process and the calls that tools/bench_cpu makes to it."""

import pathlib
import re
import subprocess
import tempfile
import threading
import time

import grpc
import lockstep_stubs

_READY = re.compile(r"^lockstep-worker ready data=(\S+) control=(\S+)$")


class Worker:
    """lockstep-worker on free ports, as a context manager."""

    def __init__(self, binary, model, *flags):
        free_port = "127.0.0.1:0"
        command = [str(binary), "--model", str(model), "--listen", free_port, "--control_listen", free_port, *flags]
        self._log = tempfile.TemporaryFile(mode="w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        line = self.process.stdout.readline().rstrip("\n")
        ready = _READY.match(line)
        if not ready:
            self.process.kill()
            self.process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{command} printed {line!r} instead of its ready line; its log:\n{self._log.read()}")
        stubs = lockstep_stubs.load()
        self.pb = stubs.pb
        self.channel = grpc.insecure_channel(ready[1])
        self.rollout = stubs.grpc.RolloutStub(self.channel)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.channel.close()
        self.process.terminate()
        self.process.wait(timeout=60)

    def peak_bytes(self):
        for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/PID/status has no VmHWM")

    def generate(self, prompts, new_tokens):
        """Every prompt's sample at once; seconds from the first request to the last token, and each sample's Done."""
        results = [None] * len(prompts)

        def one(index):
            request = self.pb.GenerateRequest(
                prompt_token_ids=prompts[index],
                sampling=self.pb.SamplingParams(temperature=1.0, max_tokens=new_tokens, ignore_eos=True, seed=index),
                logprobs=self.pb.LogprobOptions(kinds=[self.pb.LOGPROB_KIND_RAW]),
            )
            count = 0
            for response in self.rollout.Generate(request, timeout=3600):
                count += len(response.token_ids)
                if response.HasField("done"):
                    results[index] = (count, response.done)

        callers = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
        begin = time.perf_counter()
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        seconds = time.perf_counter() - begin
        for result in results:
            if result is None or result[0] != new_tokens:
                raise RuntimeError(f"a sample ended with {result}, want {new_tokens} tokens")
        return seconds, [done for _, done in results]


def measure(binary, spec, numerics):
    """The counterpart of bench_transformers.py: same prompts, lengths and sampling. Returns the same keys."""
    flags = ("--threads", str(spec["threads"]), "--numerics", numerics)
    with Worker(binary, spec["model"], *flags) as worker:
        worker.generate(spec["prompts"], 2)
        whole, first = [], []
        for _ in range(spec["repeats"]):
            whole.append(worker.generate(spec["prompts"], spec["new_tokens"])[0])
            first.append(worker.generate(spec["prompts"], 1)[0])
        return {"whole_s": min(whole), "first_s": min(first), "peak_bytes": worker.peak_bytes()}


def measure_flatness(binary, model, vocab_size, threads, lengths, new_tokens=128):
    """One sequence at each context length, best of three: milliseconds per decoded token, and microseconds per prompt
    token over the whole prompt.
    """
    rows = []
    with Worker(binary, model, "--threads", str(threads)) as worker:
        for length in lengths:
            runs = []
            for repeat in range(3):
                prompt = [(7 * i + i * i // 5 + repeat) % vocab_size for i in range(length)]
                _, (done,) = worker.generate([prompt], new_tokens)
                runs.append((done.counters.decode_ms / (new_tokens - 1), 1e3 * done.counters.prefill_ms / length))
            decode, prefill = (min(values) for values in zip(*runs))
            rows.append({"context": length, "decode_ms": decode, "prefill_us": prefill})
    return rows
