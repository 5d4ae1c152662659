"""Every field's wrong values, over real gRPC: the status code, and that the message names the field first."""

import math

import grpc
import pytest
from streams import collect, fails_with, wait_for

NAN, INF = math.nan, math.inf
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module", params=["fake-worker-server", "lockstep-worker"])
def any_worker(request, build_dir, launch, tiny_model):
    process = launch(
        [build_dir / "bin" / request.param, "--model", tiny_model, "--listen", "127.0.0.1:0", "--control_listen", "127.0.0.1:0"],
        ready_timeout=300,
    )
    yield process
    process.stop()


@pytest.fixture(scope="module")
def info(any_worker, pb):
    return any_worker.stub.GetInfo(pb.GetInfoRequest())


def sequences(pb, *lists):
    return [pb.TokenSequence(token_ids=ids) for ids in lists]


# (field path the message begins with, function of (pb, info, sampling, request) that spoils a valid request)
SAMPLING = [
    ("sampling.temperature", "temperature", [-0.1, -INF, INF, NAN, 1e-6, 1e5]),
    ("sampling.top_p", "top_p", [0.0, -0.5, 1.5, NAN, INF]),
    ("sampling.top_k", "top_k", [-1, -(2**31)]),
    ("sampling.min_p", "min_p", [-0.1, 1.0, NAN]),
    ("sampling.max_tokens", "max_tokens", [0, -1, 10**12]),
    ("sampling.min_tokens", "min_tokens", [-1, 17]),
    ("sampling.repetition_penalty", "repetition_penalty", [0.0, -1.0, NAN, INF]),
    ("sampling.presence_penalty", "presence_penalty", [101.0, -101.0, NAN]),
    ("sampling.frequency_penalty", "frequency_penalty", [INF, NAN]),
    ("sampling.stop_token_ids[1]", "stop_token_ids", [[0, -1], [0, 10**9]]),
    ("sampling.stop_token_ids", "stop_token_ids", [[0] * 5000]),
    ("sampling.allowed_token_ids[0]", "allowed_token_ids", [[-1], [10**9, 1]]),
    ("sampling.logit_bias", "logit_bias", [{-1: 1.0}, {10**9: 1.0}, {3: NAN}, {3: 1000.0}, {3: -INF}]),
    ("sampling.stop_strings[0]", "stop_strings", [[""], ["x" * 1025]]),
    ("sampling.stop_strings", "stop_strings", [["x"] * 257]),
]
SAMPLING_CASES = [(path, field, value) for path, field, values in SAMPLING for value in values]


def generate_request(pb, **fields):
    return pb.GenerateRequest(**({"prompt_token_ids": [1, 2, 3], "sampling": pb.SamplingParams(max_tokens=16)} | fields))


def expect_invalid(call, path, code=INVALID):
    with fails_with(code) as error:
        list(call)
    details = error[0].details()
    assert details.startswith(path + ":") or details.startswith(path + "[") or details.startswith(path + " key:"), details
    assert "want" in details, details


@pytest.mark.parametrize("path,field,value", SAMPLING_CASES, ids=[f"{f}={str(v)[:24]}" for _, f, v in SAMPLING_CASES])
def test_sampling(any_worker, pb, path, field, value):
    sampling = pb.SamplingParams(**({"max_tokens": 16} | {field: value}))
    expect_invalid(any_worker.stub.Generate(generate_request(pb, sampling=sampling)), path)


SEQUENCE_CASES = [
    ("stop_token_sequences", "[0].token_ids", [[]]),
    ("stop_token_sequences", "[1].token_ids[2]", [[1], [1, 2, -3]]),
    ("stop_token_sequences", "[0].token_ids[0]", [[10**9]]),
    ("stop_token_sequences", "[0].token_ids", [[1] * 257]),
    ("stop_token_sequences", "", [[1]] * 257),
    ("bad_words", "[0].token_ids", [[]]),
    ("bad_words", "[0].token_ids[1]", [[1, 10**9]]),
    ("bad_words", "[0].token_ids", [[1] * 65]),
    ("bad_words", "", [[1]] * 4097),
]


@pytest.mark.parametrize("field,suffix,value", SEQUENCE_CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(SEQUENCE_CASES)])
def test_sequences(any_worker, pb, field, suffix, value):
    sampling = pb.SamplingParams(max_tokens=16, **{field: sequences(pb, *value)})
    expect_invalid(any_worker.stub.Generate(generate_request(pb, sampling=sampling)), f"sampling.{field}{suffix}")


# Fields of GenerateRequest and ScoreRequest both.
COMMON = [
    ("request_id", {"request_id": "has space"}),
    ("request_id", {"request_id": "x" * 129}),
    ("request_id", {"request_id": "a#1"}),
    ("request_id", {"request_id": "newline\n"}),
    ("prompt_token_ids", {"prompt_token_ids": []}),
    ("prompt_token_ids[2]", {"prompt_token_ids": [1, 2, -1]}),
    ("prompt_token_ids[0]", {"prompt_token_ids": [10**9]}),
    ("time_budget_ms", {"time_budget_ms": -1}),
    ("time_budget_ms", {"time_budget_ms": 8 * 24 * 3600 * 1000}),
    ("priority", {"priority": 1_000_001}),
    ("priority", {"priority": -(2**31)}),
    ("session_id", {"session_id": "s" * 129}),
    ("cache_salt", {"cache_salt": "s" * 129}),
    ("min_weight_version.epoch", {"min_weight_version": {"epoch": -1}}),
    ("min_weight_version.step", {"min_weight_version": {"step": -1}}),
    ("logprobs.kinds[1]", {"logprobs": {"kinds": [1, 0]}}),
    ("logprobs.kinds[0]", {"logprobs": {"kinds": [9]}}),
    ("logprobs.top_k", {"logprobs": {"kinds": [1], "top_k": -1}}),
    ("logprobs.top_k", {"logprobs": {"kinds": [1], "top_k": 65}}),
]
GENERATE = COMMON + [
    ("generated_prefix_ids[0]", {"generated_prefix_ids": [-1]}),
    ("generated_prefix_ids[1]", {"generated_prefix_ids": [1, 10**9]}),
    ("sampling.max_tokens", {"generated_prefix_ids": [1] * 16}),
    ("n", {"n": 0}),
    ("n", {"n": -1}),
    ("n", {"n": 129}),
    ("first_sample_index", {"first_sample_index": -1}),
    ("first_sample_index", {"first_sample_index": 2**31 - 1, "n": 2}),
    ("stream_interval", {"stream_interval": -1}),
    ("stream_interval", {"stream_interval": 1_000_001}),
    ("logprobs.top_k", {"logprobs": {"top_k": 5}}),
    ("logprobs.prompt", {"logprobs": {"prompt": {}}}),
    ("logprobs.prompt", {"logprobs": {"kinds": [3], "prompt": {}}}),
    ("logprobs.prompt.begin", {"logprobs": {"kinds": [1], "prompt": {"begin": 0}}}),
    ("logprobs.prompt.begin", {"logprobs": {"kinds": [1], "prompt": {"begin": 3, "end": 2}}}),
    ("logprobs.prompt.begin", {"logprobs": {"kinds": [1], "prompt": {"begin": -5}}}),
    ("logprobs.prompt.end", {"logprobs": {"kinds": [1], "prompt": {"end": 4}}}),
    ("logprobs.prompt.end", {"logprobs": {"kinds": [1], "prompt": {"end": 0}}}),
]
SCORE = COMMON + [
    ("logprobs.kinds", {"logprobs": {}}),
    ("logprobs.kinds", {"logprobs": {"kinds": [1, 3]}}),
    ("logprobs.prompt", {"logprobs": {"kinds": [1], "prompt": {}}}),
    ("logprobs.kept_token_ids", {"logprobs": {"kinds": [1], "kept_token_ids": True}}),
    ("range.begin", {"range": {"begin": 0}}),
    ("range.begin", {"range": {"begin": 3, "end": 2}}),
    ("range.end", {"range": {"end": 4}}),
    ("range.end", {"range": {"end": -1}}),
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": NAN}),
]


def case_ids(cases):
    return [f"{path}-{i}" for i, (path, _) in enumerate(cases)]


@pytest.mark.parametrize("path,fields", GENERATE, ids=case_ids(GENERATE))
def test_generate(any_worker, pb, path, fields):
    expect_invalid(any_worker.stub.Generate(generate_request(pb, **fields)), path)


@pytest.mark.parametrize("path,fields", SCORE, ids=case_ids(SCORE))
def test_score(any_worker, pb, path, fields):
    base = {"prompt_token_ids": [1, 2, 3], "logprobs": {"kinds": [1]}}
    expect_invalid(any_worker.stub.Score(pb.ScoreRequest(**(base | fields))), path)


ATTACH = [
    ("request_id", {"request_id": ""}),
    ("request_id", {"request_id": "bad id"}),
    ("prompt_token_ids", {"prompt_token_ids": [1]}),
    ("sampling", {"sampling": {}}),
    ("n", {"n": 1}),
    ("stream_interval", {"stream_interval": -1}),
    ("attach.prompt_position", {"attach": {"prompt_position": -1}}),
    ("attach.samples[0].offset", {"attach": {"samples": [{"sample_index": 0, "offset": -1}]}}),
    ("attach.samples[1].sample_index", {"attach": {"samples": [{"sample_index": 0}, {"sample_index": 0}]}}),
]


@pytest.mark.parametrize("path,fields", ATTACH, ids=case_ids(ATTACH))
def test_attach(any_worker, pb, path, fields):
    expect_invalid(any_worker.stub.Generate(pb.GenerateRequest(**({"request_id": "x", "attach": {}} | fields))), path)


def test_limits_of_the_model(any_worker, info, pb):
    stub, limits, vocab = any_worker.stub, info.limits, info.model.vocab_size
    too_long = [1] * (limits.max_prompt_tokens + 1)
    expect_invalid(stub.Generate(generate_request(pb, prompt_token_ids=too_long)), "prompt_token_ids")
    options = pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW])
    too_long = [1] * (limits.max_sequence_tokens + 1)
    expect_invalid(stub.Score(pb.ScoreRequest(prompt_token_ids=too_long, logprobs=options)), "prompt_token_ids")
    expect_invalid(stub.Generate(generate_request(pb, prompt_token_ids=[vocab])), "prompt_token_ids[0]")
    fits = limits.max_sequence_tokens - 3
    expect_invalid(stub.Generate(generate_request(pb, sampling=pb.SamplingParams(max_tokens=fits + 1))), "sampling.max_tokens")
    full = generate_request(pb, generated_prefix_ids=[1] * fits, sampling=pb.SamplingParams())
    expect_invalid(stub.Generate(full), "generated_prefix_ids")
    # The last valid values are valid.
    ok = generate_request(pb, prompt_token_ids=[vocab - 1], n=2, first_sample_index=2**31 - 2)
    assert sorted(collect(stub.Generate(ok)).samples) == [2**31 - 2, 2**31 - 1]


def test_abort(any_worker, pb):
    for request_id in ("", "no good", "x" * 129):
        with fails_with(INVALID) as error:
            any_worker.stub.Abort(pb.AbortRequest(request_id=request_id))
        assert error[0].details().startswith("request_id:")
    call = any_worker.stub.Generate(
        generate_request(pb, request_id="one", stream_interval=1, sampling=pb.SamplingParams(max_tokens=1000, ignore_eos=True))
    )
    next(call)
    with fails_with(INVALID) as error:
        any_worker.stub.Abort(pb.AbortRequest(request_id="one", sample_index=1))
    assert error[0].details().startswith("sample_index:")
    call.cancel()


def test_unknown_fields_are_refused(any_worker, pb):
    # Field 99 (varint 1), at the top and inside `sampling`.
    for data in (b"\x98\x06\x01", b"\x32\x03\x98\x06\x01"):
        request = pb.GenerateRequest.FromString(generate_request(pb).SerializeToString() + data)
        with fails_with(INVALID) as error:
            list(any_worker.stub.Generate(request))
        assert "99" in error[0].details()
    with fails_with(INVALID):
        any_worker.stub.GetLoad(pb.GetLoadRequest.FromString(b"\x98\x06\x01"))


def test_not_a_message_at_all(any_worker, pb):
    """gRPC itself refuses these, with the code that its version has for it."""
    refused = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED)
    call = any_worker.channel.unary_stream("/lockstep.v1.Rollout/Generate")
    not_utf8 = generate_request(pb).SerializeToString() + b"\x0a\x01\xff"
    for data in (b"\xff\xff\xff\xff", not_utf8, b"\x0a\xff\xff\xff\x7f"):
        with pytest.raises(grpc.RpcError) as error:
            list(call(data))
        assert error.value.code() in refused
    with fails_with(grpc.StatusCode.UNIMPLEMENTED):
        list(any_worker.channel.unary_stream("/lockstep.v1.Rollout/Nothing")(b""))


def test_still_serves(any_worker, pb):
    """After all of the above."""
    assert collect(any_worker.stub.Generate(generate_request(pb))).samples[0].done.finish_reason
    # The load is that of the last step boundary.
    wait_for(lambda: any_worker.stub.GetLoad(pb.GetLoadRequest()).running_requests == 0)
    assert any_worker.stub.GetLoad(pb.GetLoadRequest()).buffered_bytes == 0
