"""Helpers for reading streams in tests: the guarantees of rollout.proto are asserted on every stream that passes through here."""

import contextlib
import time

import grpc

MAX_MESSAGE = 1 << 20


class Sample:
    def __init__(self, offset):
        self.begin = offset
        self.tokens = []
        self.logprobs = {"raw": [], "temperature": [], "processed": []}
        self.done = None

    @property
    def end(self):
        return self.begin + len(self.tokens)


class Result:
    def __init__(self):
        self.accepted = None
        self.samples = {}
        self.prompt_positions = []
        self.prompt_raw = []
        self.messages = 0


def add(result, message):
    """Adds one message of a Generate stream, checking size, order and contiguity."""
    assert message.ByteSize() <= MAX_MESSAGE
    result.messages += 1
    if message.HasField("accepted"):
        assert result.messages == 1, "accepted comes first"
        result.accepted = message.accepted
        return
    assert result.accepted is not None
    if message.HasField("prompt_logprobs"):
        assert not any(s.tokens for s in result.samples.values()), "prompt logprobs come before tokens"
        part = message.prompt_logprobs
        count = max(len(part.logprobs.raw), len(part.logprobs.temperature))
        assert not result.prompt_positions or part.begin == result.prompt_positions[-1] + 1
        result.prompt_positions += range(part.begin, part.begin + count)
        result.prompt_raw += part.logprobs.raw
        return
    sample = result.samples.setdefault(message.sample_index, Sample(message.offset))
    assert sample.done is None, "nothing follows done"
    assert message.offset == sample.end, "offsets are contiguous"
    sample.tokens += message.token_ids
    for kind, values in sample.logprobs.items():
        got = getattr(message.logprobs, kind)
        assert len(got) in (0, len(message.token_ids))
        values += got
    if message.HasField("done"):
        sample.done = message.done
        assert sample.done.end_offset == sample.end


def collect(call):
    """Reads a Generate stream to its end."""
    result = Result()
    for message in call:
        add(result, message)
    assert result.samples and all(s.done is not None for s in result.samples.values())
    return result


@contextlib.contextmanager
def fails_with(code):
    """The body ends in an RpcError of this code; yields a list that then holds the error."""
    caught = []
    try:
        yield caught
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()}: {error.details()}"
        caught.append(error)
        return
    raise AssertionError(f"no error; want {code}")


def wait_for(condition, timeout=10.0):
    """Polls until the condition holds and returns its value."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError("the condition did not come to hold in time")
