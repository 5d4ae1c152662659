"""A worker process and the calls that the checks on a GPU machine make to it.

Needs grpcio, protobuf and numpy alone: the messages are built from a descriptor set (proto/lockstep.desc in a bundle;
elsewhere protoc makes it), so that any protobuf runtime will do.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile
import threading
import types

import grpc
import numpy
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROTO = "lockstep/v1/rollout.proto"
WEIGHTS_PROTO = "lockstep/v1/weights.proto"
READY = re.compile(r"^lockstep-worker ready data=(\S+) control=(\S+)$")


def descriptor_set():
    """The serialized FileDescriptorSet of the API."""
    stored = ROOT / "proto" / "lockstep.desc"
    if stored.exists():
        return stored.read_bytes()
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "set"
        subprocess.run(
            ["protoc", f"-I{ROOT / 'proto'}", "--include_imports", f"--descriptor_set_out={out}", PROTO, WEIGHTS_PROTO],
            check=True,
        )
        return out.read_bytes()


def load_messages(proto=PROTO):
    """A namespace of the file's message classes and enum values, and `stub(channel)` of its service."""
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(descriptor_set())
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    descriptor = pool.FindFileByName(proto)
    messages = types.SimpleNamespace()
    for name, message in descriptor.message_types_by_name.items():
        setattr(messages, name, message_factory.GetMessageClass(message))
    for enum in descriptor.enum_types_by_name.values():
        for value in enum.values:
            setattr(messages, value.name, value.number)
    (service,) = descriptor.services_by_name.values()
    (proto_service,) = next(f.service for f in files.file if f.name == proto)
    kind = {False: "unary", True: "stream"}
    kinds = {m.name: f"{kind[m.client_streaming]}_{kind[m.server_streaming]}" for m in proto_service.method}

    def stub(channel):
        methods = types.SimpleNamespace()
        for method in service.methods:
            call = getattr(channel, kinds[method.name])
            request = message_factory.GetMessageClass(method.input_type)
            response = message_factory.GetMessageClass(method.output_type)
            path = f"/{service.full_name}/{method.name}"
            setattr(methods, method.name, call(path, request.SerializeToString, response.FromString))
        return methods

    messages.stub = stub
    return messages


@dataclasses.dataclass
class Scored:
    """Of positions 1 to the end: fp32 RAW log-probabilities [T - 1], and of the top k tokens [T - 1, K]."""

    logprobs: numpy.ndarray
    top_ids: numpy.ndarray
    top_logprobs: numpy.ndarray


@dataclasses.dataclass
class Generated:
    tokens: list
    logprobs: numpy.ndarray  # fp32 RAW [len(tokens)]
    done: object = None  # the sample's Done message


class Worker:
    """A running lockstep-worker. As a context manager it ends with the block if it was started here."""

    def __init__(self, address, process=None, log=None, control=None):
        self.address = address
        self.control = control  # address of the control plane; None: not known
        self.process = process
        self._log = log
        self.messages = load_messages()
        options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
        self.channel = grpc.insecure_channel(address, options)
        self.rollout = self.messages.stub(self.channel)

    @classmethod
    def start(cls, binary, model, flags=(), ready_timeout=300, environment=None):
        """Starts `binary` on free ports, with `environment` beside this process's, and waits for its ready line."""
        free_port = "127.0.0.1:0"
        command = [str(binary), "--model", str(model), "--listen", free_port, "--control_listen", free_port, *flags]
        log = tempfile.TemporaryFile(mode="w+")
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, **pipes, text=True, env=os.environ | (environment or {}))
        timer = threading.Timer(ready_timeout, process.kill)
        timer.start()
        line = process.stdout.readline().rstrip("\n")
        timer.cancel()
        ready = READY.match(line)
        if ready is None:
            process.kill()
            code = process.wait()
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}\nfirst line {line!r}, exit status {code}; its log:\n{log.read()}")
        return cls(ready[1], process, log, ready[2])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()

    def stop(self):
        self.channel.close()
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def log(self):
        """What the process has written to standard error; empty for a worker that was not started here."""
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read()

    def info(self):
        return self.rollout.GetInfo(self.messages.GetInfoRequest(), timeout=60)

    def score(self, tokens, top_k=0, timeout=600):
        m = self.messages
        request = m.ScoreRequest(
            prompt_token_ids=tokens, logprobs=m.LogprobOptions(kinds=[m.LOGPROB_KIND_RAW], top_k=top_k)
        )
        raw, ids, tops, done = [], [], [], None
        for response in self.rollout.Score(request, timeout=timeout):
            if response.logprobs.raw and response.offset != len(raw) + 1:
                raise RuntimeError(f"Score: offset {response.offset}, want {len(raw) + 1}")
            raw.extend(response.logprobs.raw)
            ids.extend(response.logprobs.top_raw_ids)
            tops.extend(response.logprobs.top_raw_logprobs)
            if response.HasField("done"):
                done = response.done
        if done is None or done.finish_reason != m.FINISH_REASON_SCORED or len(raw) != len(tokens) - 1:
            raise RuntimeError(f"Score of {len(tokens)} tokens: {len(raw)} log-probabilities, done {done}")
        shape = (len(raw), len(ids) // max(1, len(raw)))
        return Scored(
            numpy.array(raw, numpy.float32),
            numpy.array(ids, numpy.int64).reshape(shape),
            numpy.array(tops, numpy.float32).reshape(shape),
        )

    def generate(self, prompt, max_tokens, seed=0, timeout=600, stream_interval=0, **sampling):
        """One sample of exactly max_tokens tokens. stream_interval: tokens a message; 0: all in one, at the end."""
        m = self.messages
        request = m.GenerateRequest(
            prompt_token_ids=prompt,
            sampling=m.SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **sampling),
            logprobs=m.LogprobOptions(kinds=[m.LOGPROB_KIND_RAW]),
            stream_interval=stream_interval,
        )
        tokens, logprobs, done = [], [], None
        for response in self.rollout.Generate(request, timeout=timeout):
            tokens.extend(response.token_ids)
            logprobs.extend(response.logprobs.raw)
            if response.HasField("done"):
                done = response.done
        if done is None or len(tokens) != max_tokens or len(logprobs) != len(tokens):
            raise RuntimeError(f"Generate: {len(tokens)} of {max_tokens} tokens, {len(logprobs)} logprobs, done {done}")
        return Generated(tokens, numpy.array(logprobs, numpy.float32), done)

    def in_flight(self, call, items, at_once=64):
        """call(item) for every item, up to `at_once` at the same time; results in order."""
        with concurrent.futures.ThreadPoolExecutor(max(1, min(at_once, len(items)))) as executor:
            return list(executor.map(call, items))
