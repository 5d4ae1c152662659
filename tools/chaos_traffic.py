"""tools/chaos's clients: Generate calls all the while, with everything kept that a worker delivered; and the reference
that computes it again.
"""

import dataclasses
import random
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from chaos_fleet import READY
from chaos_report import start_time

TEMPERATURE = 0.9
MAX_REDRAWN = 128  # tokens of a span; the log-probabilities of longer ones are checked all the same
CHANNEL = [
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


@dataclasses.dataclass
class Sample:
    """What a client holds of one sample. spans: None if the stream broke before they came."""

    worker: int
    generation: int
    prompt: list
    seed: int
    index: int
    begin: float
    end: float = 0.0
    tokens: list = dataclasses.field(default_factory=list)
    raw: list = dataclasses.field(default_factory=list)
    scaled: list = dataclasses.field(default_factory=list)  # at TEMPERATURE
    spans: list | None = None  # (weights, state, begin, end)
    finish: str = ""

    def add(self, message, pb):
        if message.offset != len(self.tokens):
            raise ValueError(f"offset {message.offset}, want {len(self.tokens)}")
        self.tokens += message.token_ids
        self.raw += message.logprobs.raw
        self.scaled += message.logprobs.temperature
        if message.HasField("done"):
            self.spans = [
                (
                    (s.weight_version.epoch, s.weight_version.step),
                    (s.state_version.epoch, s.state_version.step),
                    s.begin,
                    s.end,
                )
                for s in message.done.version_spans
            ]
            self.finish = pb.FinishReason.Name(message.done.finish_reason)


class Clients:
    """`count` threads for each worker, and one whose requests are long. Each rests for up to `pause_s` after a call."""

    def __init__(self, campaign, count, pause_s, deadline_s):
        self.campaign, self.pause_s, self.deadline_s = campaign, pause_s, deadline_s
        self.samples, self.lock = [], threading.Lock()
        self.calls = {}  # by status code
        self.longest = 0.0
        self.threads = [
            threading.Thread(target=self.run, args=(worker, k), daemon=True)
            for worker in campaign.workers
            for k in range(count + 1)
        ]

    def start(self):
        for thread in self.threads:
            thread.start()

    def join(self):
        for thread in self.threads:
            thread.join(2 * self.deadline_s + 5)
            if thread.is_alive():
                self.campaign.violation("deadline", "a client's call never ended")

    def run(self, worker, k):
        rng = random.Random(f"{self.campaign.seed}/client/{worker.index}/{k}")
        generation, channel, stub = None, None, None
        while not self.campaign.quiet.is_set():
            place = worker.snapshot()
            if place is None:
                time.sleep(0.02)
                continue
            if place[0] != generation:
                if channel is not None:
                    channel.close()
                generation, channel = place[0], grpc.insecure_channel(place[1], CHANNEL)
                stub = self.campaign.stubs.grpc.RolloutStub(channel)
            waits = self.campaign.published if rng.random() < 0.1 else None
            if k == 0 and rng.random() < 0.12:  # more than fits the worker's memory: they push each other out
                self.call(stub, worker.index, generation, rng, rng.randrange(1300, 1800), n=3)
            else:
                self.call(stub, worker.index, generation, rng, rng.randrange(20, 200), waits)
            time.sleep(rng.random() * self.pause_s)

    def call(self, stub, worker, generation, rng, tokens, min_version=None, n=None):
        """One Generate call; its samples, which are kept as well."""
        pb = self.campaign.stubs.pb
        n = n or rng.choice((1, 1, 2))
        first = rng.randrange(100)
        request = pb.GenerateRequest(
            prompt_token_ids=[rng.randrange(2, 1024) for _ in range(rng.randrange(2, 90))],
            n=n,
            first_sample_index=first,
            sampling=pb.SamplingParams(
                temperature=TEMPERATURE, seed=rng.getrandbits(64), max_tokens=tokens, ignore_eos=True
            ),
            logprobs=pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW, pb.LOGPROB_KIND_TEMPERATURE]),
            stream_interval=rng.choice((1, 8, 32)),
        )
        if min_version is not None:
            request.min_weight_version.CopyFrom(pb.WeightVersion(epoch=min_version[0], step=min_version[1]))
        begin = time.monotonic()
        prompt, seed = list(request.prompt_token_ids), request.sampling.seed
        samples = {first + i: Sample(worker, generation, prompt, seed, first + i, begin) for i in range(n)}
        code = "OK"
        try:
            for message in stub.Generate(request, timeout=self.deadline_s):
                if message.token_ids or message.HasField("done"):
                    samples[message.sample_index].add(message, pb)
        except grpc.RpcError as error:
            code = error.code().name
        except (ValueError, KeyError) as error:
            self.campaign.violation("stream", f"worker {worker}: {error}")
        end = time.monotonic()
        for sample in samples.values():
            sample.end = end
            if code == "OK" and sample.spans is None:
                self.campaign.violation("stream", f"worker {worker}: a call ended with OK before its samples did")
        with self.lock:
            self.longest = max(self.longest, end - begin)
            self.calls[code] = self.calls.get(code, 0) + 1
            self.samples += [s for s in samples.values() if s.tokens]
        if end - begin > 2 * self.deadline_s:
            self.campaign.violation(
                "deadline", f"a Generate call took {end - begin:.1f} s, its deadline was {self.deadline_s} s"
            )
        if code in ("INTERNAL", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "UNKNOWN", "DATA_LOSS"):
            self.campaign.violation("stream", f"worker {worker}: Generate ended with {code}")
        return list(samples.values())


def same(a, b):
    return np.array_equal(np.asarray(a, np.float32).view(np.uint32), np.asarray(b, np.float32).view(np.uint32))


class Reference:
    """A fresh worker that loaded exactly one version from files: no update ever reached it."""

    def __init__(self, campaign, version):
        self.campaign, self.version = campaign, version
        self.directory = campaign.versions.write(version, campaign.scratch / f"version.{version[0]}.{version[1]}")

    def __enter__(self):
        free = "127.0.0.1:0"
        command = [
            str(self.campaign.binary),
            "--model",
            str(self.directory),
            "--listen",
            free,
            "--control_listen",
            free,
        ]
        self.process = subprocess.Popen(
            [*command, "--memory_gb", "0.5"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.campaign.pids[self.process.pid] = start_time(self.process.pid)
        self.channel = grpc.insecure_channel(READY.match(self.process.stdout.readline().rstrip("\n"))[1], CHANNEL)
        self.stub = self.campaign.stubs.grpc.RolloutStub(self.channel)
        return self

    def __exit__(self, *exception):
        self.channel.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.directory)

    def score(self, sample, begin, end):
        """RAW and TEMPERATURE log-probabilities of the sample's tokens [begin, end), given those before."""
        pb, at = self.campaign.stubs.pb, len(sample.prompt)
        request = pb.ScoreRequest(
            prompt_token_ids=sample.prompt + sample.tokens[:end],
            range=pb.PositionRange(begin=at + begin, end=at + end),
            logprobs=pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW, pb.LOGPROB_KIND_TEMPERATURE]),
            temperature=TEMPERATURE,
        )
        raw, scaled = [], []
        for message in self.stub.Score(request, timeout=120):
            raw += message.logprobs.raw
            scaled += message.logprobs.temperature
        return raw, scaled

    def draw(self, sample, begin, end):
        """The tokens [begin, end) drawn again after those before them."""
        pb = self.campaign.stubs.pb
        request = pb.GenerateRequest(
            prompt_token_ids=sample.prompt,
            generated_prefix_ids=sample.tokens[:begin],
            first_sample_index=sample.index,
            sampling=pb.SamplingParams(temperature=TEMPERATURE, seed=sample.seed, max_tokens=end, ignore_eos=True),
        )
        return [token for message in self.stub.Generate(request, timeout=120) for token in message.token_ids]


class Replay:
    """Every sample against references of the versions that its spans name; or, where the stream broke before the spans
    came, of all versions it can be of.
    """

    def __init__(self, campaign, history):
        """history: history(sample) -> [(version, keep)], all its worker may have served then, in order."""
        self.campaign, self.history = campaign, history
        self.counts = dict.fromkeys(
            ("samples", "tokens", "checked", "redrawn", "kept", "kept_possible", "broken_samples", "differing"), 0
        )
        self.lock = threading.Lock()

    def run(self, samples):
        exact, broken, scores = {}, {}, {}
        for sample in samples:
            self.counts["samples"] += 1
            self.counts["tokens"] += len(sample.tokens)
            if sample.spans is None:
                self.counts["broken_samples"] += 1
                for version, _ in self.history(sample):
                    broken.setdefault(version, []).append(sample)
            else:
                for version, begin, end in self.check_spans(sample):
                    exact.setdefault(version, []).append((sample, begin, end))
        versions = sorted({*exact, *broken})
        for version in versions:
            with Reference(self.campaign, version) as reference, ThreadPoolExecutor(24) as pool:
                jobs = [pool.submit(self.check_exact, reference, *item) for item in exact.get(version, ())]
                for sample in broken.get(version, ()):
                    scores[id(sample), version] = pool.submit(reference.score, sample, 0, len(sample.tokens))
                for job in jobs:
                    job.result()
        for sample in samples:
            if sample.spans is None:
                self.check_broken(sample, scores)
        self.counts["versions"] = len(versions)
        return self.counts

    def check_spans(self, sample):
        """The spans' own order; gives (version, begin, end) of those that a forward pass reproduces."""
        possible = dict(self.history(sample))
        where, previous = f"worker {sample.worker}.{sample.generation}, spans {sample.spans}", (None, (-1, -1), 0, 0)
        if (sample.spans[-1][3] if sample.spans else 0) != len(sample.tokens):
            self.campaign.violation("spans", f"{where}: of {len(sample.tokens)} tokens")
        for span in sample.spans:
            weights, state, begin, end = span
            if weights not in possible:
                self.campaign.violation(
                    "spans", f"{where}: {weights} cannot have served there; possible: {sorted(possible)}"
                )
            if (
                begin != previous[3]
                or end <= begin
                or state > weights
                or weights <= previous[1]
                and previous[0] is not None
            ):
                self.campaign.violation("spans", f"{where}: out of order")
            if state != weights:
                if not possible.get(weights) or state not in possible:
                    self.campaign.violation("spans", f"{where}: a kept state, and no update kept any")
                self.counts["kept"] += end - begin
            else:
                yield weights, begin, end
            previous = (state, weights, begin, end)

    def check_exact(self, reference, sample, begin, end):
        raw, scaled = reference.score(sample, begin, end)
        drawn = end - begin <= MAX_REDRAWN
        tokens = reference.draw(sample, begin, end) if drawn else sample.tokens[begin:end]
        good = (
            same(raw, sample.raw[begin:end])
            and same(scaled, sample.scaled[begin:end])
            and tokens == sample.tokens[begin:end]
        )
        with self.lock:
            self.counts["checked"] += end - begin
            self.counts["redrawn"] += (end - begin) * drawn
        if not good:
            wrong = [i for i in range(begin, end) if i - begin >= len(raw) or not same(raw[i - begin], sample.raw[i])]
            with self.lock:
                self.counts["differing"] += max(len(wrong), 1)
            self.campaign.violation(
                "replay",
                f"worker {sample.worker}.{sample.generation}: spans {sample.spans}, version {reference.version}: "
                f"{len(wrong)} of {end - begin} log-probabilities differ, the first at {wrong[:1]}; tokens "
                f"{'equal' if tokens == sample.tokens[begin:end] else 'differ'}",
            )

    def check_broken(self, sample, scores):
        """Each token must be of one version, and those must not go back. Past an update that may have kept the state,
        tokens that no version explains are counted, not checked.
        """
        history = self.history(sample)
        results = [scores[id(sample), version].result() for version, _ in history]
        at = 0
        for i in range(len(sample.tokens)):
            found = next(
                (
                    j
                    for j in range(at, len(history))
                    if same(results[j][0][i], sample.raw[i]) and same(results[j][1][i], sample.scaled[i])
                ),
                None,
            )
            if found is None:
                rest = len(sample.tokens) - i
                # A kept sample has a first token, of its state's own version.
                if i and (any(keep for _, keep in history[at + 1 :]) or at and history[at][1]):
                    self.counts["kept_possible"] += rest
                else:
                    self.counts["differing"] += rest
                    self.campaign.violation(
                        "replay",
                        f"worker {sample.worker}.{sample.generation}: token {i} of a broken stream is of none of {history}",
                    )
                return
            at = found
            self.counts["checked"] += 1
