"""Weight updates of a real worker over the stream transport: what serves afterwards, what happens to samples in flight,
and what is refused. A client written against weights.proto alone.
"""

import importlib
import time

import checkpoints
import grpc
import pytest

DTYPES = {"BF16": 2, "F32": 1, "F16": 3}
CHUNK = 100_000


@pytest.fixture(scope="module")
def wpb(stubs):
    return importlib.import_module("lockstep.v1.weights_pb2")


@pytest.fixture(scope="module")
def cpb(stubs):
    return importlib.import_module("lockstep.v1.control_pb2")


def control_stubs(process):
    channel = grpc.insecure_channel(process.control)
    weights = importlib.import_module("lockstep.v1.weights_pb2_grpc").WeightsStub(channel)
    return weights, importlib.import_module("lockstep.v1.control_pb2_grpc").ControlStub(channel)


def digest(data):
    """docs/weights.md, word by word."""
    mask = (1 << 64) - 1

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    padded = data + bytes(-len(data) % 8)
    total = sum(
        mix(int.from_bytes(padded[i : i + 8], "little") + (i // 8 + 1) * 0x9E3779B97F4A7C15 & mask)
        for i in range(0, len(padded), 8)
    )
    return mix(total + len(data) & mask)


class Sender:
    """One learner."""

    def __init__(self, pb, wpb, stub):
        self.pb, self.wpb, self.stub = pb, wpb, stub

    def version(self, step):
        return self.pb.WeightVersion(epoch=0, step=step)

    def manifest(self, tensors, base=None):
        infos = [
            self.wpb.TensorInfo(name=name, dtype=DTYPES[dtype], shape=shape)
            for name, (dtype, shape, _) in tensors.items()
        ]
        return self.wpb.Manifest(tensors=infos, base_version=None if base is None else self.version(base))

    def begin(self, step, tensors, base=None, lease_ms=0):
        request = self.wpb.BeginRequest(
            version=self.version(step), manifest=self.manifest(tensors, base), lease_ms=lease_ms
        )
        return self.stub.Begin(request, timeout=30)

    def chunks(self, step, tensors, received=None):
        first = True
        for index, (_, _, data) in enumerate(tensors.values()):
            for offset in range(received[index] if received else 0, len(data), CHUNK):
                yield self.wpb.PushRequest(
                    version=self.version(step) if first else None,
                    tensor=index,
                    offset=offset,
                    data=data[offset : offset + CHUNK],
                )
                first = False

    def push(self, step, tensors):
        return self.stub.Push(self.chunks(step, tensors), timeout=60)

    def verify(self, step, tensors):
        digests = [digest(data) for _, _, data in tensors.values()]
        return self.stub.Verify(self.wpb.VerifyRequest(version=self.version(step), digests=digests), timeout=60)

    def commit(self, step, **policy):
        return self.stub.Commit(self.wpb.CommitRequest(version=self.version(step), **policy), timeout=60)

    def stage(self, step, tensors, base=None):
        self.begin(step, tensors, base)
        self.push(step, tensors)
        self.verify(step, tensors)

    def status(self):
        return self.stub.GetStatus(self.wpb.GetStatusRequest(), timeout=10)


@pytest.fixture
def fresh(start_worker, tiny_model, pb, wpb):
    """(worker of the tiny checkpoint, its sender)."""
    process = start_worker(tiny_model, "--max_sequences", "16")
    return process, Sender(pb, wpb, control_stubs(process)[0])


def request(pb, **fields):
    defaults = {
        "prompt_token_ids": [5, 17, 3, 99, 250, 7, 8, 9],
        "sampling": pb.SamplingParams(temperature=0.9, seed=11, max_tokens=150, ignore_eos=True),
        "logprobs": pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW]),
        "stream_interval": 1,
    }
    return pb.GenerateRequest(**(defaults | fields))


class Reader:
    """A stream read message by message."""

    def __init__(self, stub, message):
        self.call = stub.Generate(message, timeout=120)
        self.tokens, self.logprobs, self.done = [], [], None

    def read(self, until=None):
        """Until there are `until` tokens, or to the end."""
        for message in self.call:
            self.tokens += message.token_ids
            self.logprobs += message.logprobs.raw
            if message.HasField("done"):
                self.done = message.done
            if until is not None and len(self.tokens) >= until:
                break
        return self


def spans(done):
    return [(s.weight_version.step, s.state_version.step, s.begin, s.end) for s in done.version_spans]


def refused(code, call, *arguments, **keywords):
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, **keywords)
    assert error.value.code() == code, error.value.details()
    return error.value.details()


def test_updated_worker_equals_one_started_from_the_new_weights(
    fresh, start_worker, tiny_model, old, new, pb, wpb, tmp_path
):
    process, sender = fresh
    before = Reader(process.stub, request(pb)).read()
    assert spans(before.done) == [(0, 0, 0, 150)]

    checkpoints.write(tmp_path / "new", new, tiny_model)
    other = start_worker(tmp_path / "new")
    want = Reader(other.stub, request(pb)).read()
    assert want.logprobs != before.logprobs

    sender.stage(1, new)
    assert Reader(process.stub, request(pb)).read().logprobs == before.logprobs, "the old weights serve until Commit"
    sender.commit(1)
    after = Reader(process.stub, request(pb)).read()
    assert after.tokens == want.tokens
    assert after.logprobs == want.logprobs
    assert spans(after.done) == [(1, 1, 0, 150)]
    assert process.stub.GetInfo(pb.GetInfoRequest(), timeout=10).weight_version.step == 1

    digests = sender.stub.GetDigests(wpb.GetDigestsRequest(), timeout=30)
    assert digests.weight_version.step == 1
    other_digests = control_stubs(other)[0].GetDigests(wpb.GetDigestsRequest(), timeout=30)
    assert {t.name: t.digest for t in digests.tensors} == {t.name: t.digest for t in other_digests.tensors}
    name = "model.norm.weight"
    one = sender.stub.GetDigests(wpb.GetDigestsRequest(names=[name]), timeout=30)
    if new[name][0] == "BF16":
        assert [(t.name, t.digest) for t in one.tensors] == [(name, digest(new[name][2]))]

    # And back, as a subset: what differs is the one tensor.
    sender.stage(2, {name: old[name]}, base=1)
    sender.commit(2)
    mixed = dict(new) | {name: old[name]}
    checkpoints.write(tmp_path / "mixed", mixed, tiny_model)
    want = Reader(start_worker(tmp_path / "mixed").stub, request(pb)).read()
    assert Reader(process.stub, request(pb)).read().logprobs == want.logprobs


def test_recompute_goes_on_as_if_started_under_the_new_weights(fresh, new, pb, wpb):
    process, sender = fresh
    sender.stage(1, new)
    control = control_stubs(process)[1]
    cpb = importlib.import_module("lockstep.v1.control_pb2")
    reader = Reader(process.stub, request(pb)).read(until=20)
    control.Pause(cpb.PauseRequest(), timeout=10)
    result = sender.commit(1, policy=wpb.IN_FLIGHT_POLICY_RECOMPUTE)
    assert (result.kept, result.recomputed, result.aborted) == (0, 1, 0)
    control.Resume(cpb.ResumeRequest(), timeout=10)
    reader.read()
    (_, _, _, cut), second = spans(reader.done)[0], spans(reader.done)[1]
    assert spans(reader.done) == [(0, 0, 0, cut), (1, 1, cut, 150)]
    assert cut >= 20 and second
    again = Reader(process.stub, request(pb, generated_prefix_ids=reader.tokens[:cut])).read()
    assert again.tokens == reader.tokens[cut:]
    assert again.logprobs == reader.logprobs[cut:]


def test_keep_goes_on_from_the_old_state(fresh, new, pb, wpb):
    process, sender = fresh
    sender.stage(1, new)
    reader = Reader(process.stub, request(pb)).read(until=20)
    result = sender.commit(1, policy=wpb.IN_FLIGHT_POLICY_KEEP)
    assert (result.kept, result.recomputed, result.aborted) == (1, 0, 0)
    reader.read()
    cut = reader.done.version_spans[0].end
    assert spans(reader.done) == [(0, 0, 0, cut), (1, 0, cut, 150)]
    recomputed = Reader(process.stub, request(pb, generated_prefix_ids=reader.tokens[:cut])).read()
    assert recomputed.logprobs != reader.logprobs[cut:]


def test_abort_keeps_what_there_is(fresh, new, pb, wpb):
    process, sender = fresh
    sender.stage(1, new)
    reader = Reader(process.stub, request(pb)).read(until=10)
    assert sender.commit(1, policy=wpb.IN_FLIGHT_POLICY_ABORT).aborted == 1
    reader.read()
    assert reader.done.abort_reason == pb.ABORT_REASON_WEIGHT_UPDATE
    assert spans(reader.done) == [(0, 0, 0, len(reader.tokens))]


def test_finish_waits_holds_new_requests_and_falls_back(fresh, new, old, pb, wpb):
    process, sender = fresh
    sender.stage(1, new)
    reader = Reader(process.stub, request(pb)).read(until=10)
    result = sender.commit(1, policy=wpb.IN_FLIGHT_POLICY_FINISH, finish_timeout_ms=60_000)
    assert (result.kept, result.recomputed, result.aborted) == (0, 0, 0)
    assert spans(reader.read().done) == [(0, 0, 0, 150)]

    sender.stage(2, old)
    long = request(pb, sampling=pb.SamplingParams(seed=1, max_tokens=1500, ignore_eos=True))
    reader = Reader(process.stub, long).read(until=10)
    finish = {"policy": wpb.IN_FLIGHT_POLICY_FINISH, "finish_timeout_ms": 50}
    details = refused(grpc.StatusCode.DEADLINE_EXCEEDED, sender.commit, 2, **finish)
    assert details.startswith("finish_timeout_ms")
    assert sender.status().state == wpb.UPDATE_STATE_VERIFIED
    assert Reader(process.stub, request(pb)).read().done.finish_reason == pb.FINISH_REASON_LENGTH, "held no longer"
    result = sender.commit(2, fallback=wpb.IN_FLIGHT_POLICY_RECOMPUTE, **finish)
    assert result.recomputed >= 1
    assert [s[:2] for s in spans(reader.read().done)] == [(1, 1), (2, 2)]


def test_requests_wait_for_the_version_they_ask_for(fresh, new, pb, wpb):
    process, sender = fresh
    message = request(pb, min_weight_version=sender.version(1))
    reader = Reader(process.stub, message)
    sender.stage(1, new)
    sender.commit(1)
    assert spans(reader.read().done) == [(1, 1, 0, 150)]


def test_refusals(fresh, old, new, pb, wpb):
    _, sender = fresh
    code = grpc.StatusCode
    refused(code.NOT_FOUND, sender.commit, 1)
    refused(code.NOT_FOUND, sender.push, 1, new)
    refused(code.FAILED_PRECONDITION, sender.begin, 0, new)
    refused(code.INVALID_ARGUMENT, sender.begin, -1, new)
    refused(code.INVALID_ARGUMENT, sender.begin, 1, new, lease_ms=10)
    refused(code.INVALID_ARGUMENT, sender.begin, 1, {})
    refused(code.FAILED_PRECONDITION, sender.begin, 2, {"model.norm.weight": new["model.norm.weight"]}, base=1)
    wrong = dict(new)
    dtype, shape, data = wrong.pop("model.norm.weight")
    wrong["model.norm.bias"] = (dtype, shape, data)
    details = refused(code.INVALID_ARGUMENT, sender.begin, 1, wrong)
    assert "unknown tensor model.norm.bias" in details and "missing model.norm.weight" in details

    sender.begin(1, new)
    refused(code.FAILED_PRECONDITION, sender.begin, 2, new)
    refused(code.FAILED_PRECONDITION, sender.commit, 1)
    assert "not there yet" in refused(code.FAILED_PRECONDITION, sender.verify, 1, new)
    sender.push(1, new)
    corrupt = dict(new)
    corrupt["model.norm.weight"] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])
    assert "model.norm.weight (digest" in refused(code.DATA_LOSS, sender.verify, 1, corrupt)
    assert sender.status().state == wpb.UPDATE_STATE_SERVING

    infinite = dict(new)
    infinite["model.norm.weight"] = (dtype, shape, b"\x80\x7f" * (len(data) // 2)) if dtype == "BF16" else (
        dtype, shape, b"\0\0\x80\x7f" * (len(data) // 4))
    sender.begin(1, infinite)
    sender.push(1, infinite)
    assert "NaN or infinite" in refused(code.DATA_LOSS, sender.verify, 1, infinite)


def test_a_broken_stream_goes_on_and_a_lease_ends(fresh, new, wpb):
    _, sender = fresh
    sender.begin(1, new)

    def broken():
        for count, chunk in enumerate(sender.chunks(1, new)):
            if count == 7:
                raise OSError("the learner's network")
            yield chunk

    with pytest.raises(grpc.RpcError):
        sender.stub.Push(broken(), timeout=30)
    deadline = time.monotonic() + 10
    while sender.status().received_bytes == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    received = list(sender.begin(1, new).received_bytes)
    assert 0 < sum(received) < sum(len(data) for _, _, data in new.values())
    sender.stub.Push(sender.chunks(1, new, received), timeout=60)
    sender.verify(1, new)
    sender.commit(1)

    sender.begin(2, new, lease_ms=1000)
    assert sender.status().state == wpb.UPDATE_STATE_RECEIVING
    time.sleep(1.2)
    assert sender.status().state == wpb.UPDATE_STATE_SERVING
    sender.begin(3, new)
    assert sender.stub.Rollback(wpb.RollbackRequest(version=sender.version(3)), timeout=10).dropped
    assert not sender.stub.Rollback(wpb.RollbackRequest(version=sender.version(3)), timeout=10).dropped


def test_pause_resume_and_drain(fresh, pb, cpb):
    process, _ = fresh
    control = control_stubs(process)[1]
    want = Reader(process.stub, request(pb)).read()
    reader = Reader(process.stub, request(pb)).read(until=10)
    assert control.Pause(cpb.PauseRequest(), timeout=10).in_flight == 1
    steps = process.stub.GetLoad(pb.GetLoadRequest(), timeout=10).steps
    time.sleep(0.3)
    load = process.stub.GetLoad(pb.GetLoadRequest(), timeout=10)
    assert load.steps == steps and load.paused
    control.Resume(cpb.ResumeRequest(), timeout=10)
    assert reader.read().logprobs == want.logprobs
    assert not process.stub.GetLoad(pb.GetLoadRequest(), timeout=10).paused

    reader = Reader(process.stub, request(pb)).read(until=10)
    refused(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        control.Pause,
        cpb.PauseRequest(mode=cpb.PAUSE_MODE_FINISH, timeout_ms=600_000),
        timeout=0.01,
    )
    assert reader.read().logprobs == want.logprobs
    assert Reader(process.stub, request(pb)).read().logprobs == want.logprobs, "whose client has gone pauses nothing"

    reader = Reader(process.stub, request(pb)).read(until=10)
    assert control.Pause(cpb.PauseRequest(mode=cpb.PAUSE_MODE_FINISH, timeout_ms=60_000), timeout=70).in_flight == 0
    assert reader.read().logprobs == want.logprobs
    reader = Reader(process.stub, request(pb))  # waits
    assert control.Pause(cpb.PauseRequest(mode=cpb.PAUSE_MODE_ABORT), timeout=10).in_flight == 0
    assert reader.read().done.abort_reason == pb.ABORT_REASON_CLIENT
    control.Resume(cpb.ResumeRequest(), timeout=10)

    refused(grpc.StatusCode.INVALID_ARGUMENT, control.Pause, cpb.PauseRequest(timeout_ms=1), timeout=10)
    refused(grpc.StatusCode.INVALID_ARGUMENT, control.Drain, cpb.DrainRequest(timeout_ms=-1), timeout=10)
    reader = Reader(process.stub, request(pb)).read(until=10)
    control.Pause(cpb.PauseRequest(), timeout=10)
    control.Drain(cpb.DrainRequest(timeout_ms=60_000), timeout=70)
    assert reader.read().logprobs == want.logprobs
    with pytest.raises(grpc.RpcError) as error:
        Reader(process.stub, request(pb)).read()
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_worker_that_takes_no_weights_says_so(start_worker, tiny_model, wpb):
    weights = control_stubs(start_worker(tiny_model, "--weights_receive", "off"))[0]
    for call, message in ((weights.GetDigests, wpb.GetDigestsRequest()), (weights.Begin, wpb.BeginRequest())):
        assert "--weights_receive=off" in refused(grpc.StatusCode.FAILED_PRECONDITION, call, message, timeout=10)
