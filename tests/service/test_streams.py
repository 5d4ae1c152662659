"""How results travel: chunking, cancellation, deadlines, re-attaching, slow readers. Against the fake worker, whose pace the tests choose."""

import time

import grpc
import pytest
from streams import Result, add, collect, fails_with, wait_for


def request(pb, **fields):
    sampling = {"seed": 7, "max_tokens": 64, "ignore_eos": True} | fields.pop("sampling", {})
    base = {"prompt_token_ids": [5, 6, 7], "sampling": pb.SamplingParams(**sampling)}
    return pb.GenerateRequest(**(base | fields))


def load(worker, pb):
    return worker.stub.GetLoad(pb.GetLoadRequest())


def test_final_only(start_fake, pb):
    worker = start_fake()
    messages = list(worker.stub.Generate(request(pb, request_id="a/b:c.d_e-1")))
    assert len(messages) == 2
    assert messages[0].accepted.request_id == "a/b:c.d_e-1"
    assert messages[0].accepted.seed == 7 and messages[0].accepted.max_tokens == 64
    assert len(messages[1].token_ids) == 64
    assert messages[1].done.finish_reason == pb.FINISH_REASON_LENGTH
    assert messages[1].done.length_reason == pb.LENGTH_REASON_MAX_TOKENS
    assert [(s.begin, s.end) for s in messages[1].done.version_spans] == [(0, 64)]


@pytest.mark.parametrize("interval", [1, 10])
def test_streaming_gives_the_same_tokens(start_fake, pb, interval):
    worker = start_fake("--fake_step_ms", "2")
    whole = collect(worker.stub.Generate(request(pb, n=3)))
    pieces = collect(worker.stub.Generate(request(pb, n=3, stream_interval=interval)))
    assert {i: s.tokens for i, s in whole.samples.items()} == {i: s.tokens for i, s in pieces.samples.items()}
    assert whole.messages == 4
    assert pieces.messages > 3 * 64 / interval / 4


def test_samples_are_numbered_from_first_sample_index(start_fake, pb):
    worker = start_fake()
    whole = collect(worker.stub.Generate(request(pb, n=4)))
    half = collect(worker.stub.Generate(request(pb, n=2, first_sample_index=2)))
    assert sorted(half.samples) == [2, 3]
    assert all(half.samples[i].tokens == whole.samples[i].tokens for i in (2, 3))


def test_prefix_is_continued(start_fake, pb):
    worker = start_fake()
    whole = collect(worker.stub.Generate(request(pb))).samples[0]
    rest = collect(worker.stub.Generate(request(pb, generated_prefix_ids=whole.tokens[:20]))).samples[0]
    assert rest.begin == 20 and rest.tokens == whole.tokens[20:]
    assert [(s.begin, s.end) for s in rest.done.version_spans] == [(20, 64)]


def test_drawn_seed_and_id_are_echoed(start_fake, pb):
    worker = start_fake()
    unseeded = pb.GenerateRequest(prompt_token_ids=[1], sampling=pb.SamplingParams(max_tokens=20, ignore_eos=True))
    first = collect(worker.stub.Generate(unseeded))
    second = collect(worker.stub.Generate(unseeded))
    assert first.accepted.seed != second.accepted.seed
    assert first.accepted.request_id != second.accepted.request_id and len(first.accepted.request_id) == 36
    unseeded.sampling.seed = first.accepted.seed
    assert collect(worker.stub.Generate(unseeded)).samples[0].tokens == first.samples[0].tokens


def test_unset_max_tokens_fills_the_context(start_fake, pb):
    worker = start_fake("--fake_step_ms", "0")
    limit = worker.stub.GetInfo(pb.GetInfoRequest()).limits.max_sequence_tokens
    sampling = pb.SamplingParams(seed=1, ignore_eos=True)
    got = collect(worker.stub.Generate(pb.GenerateRequest(prompt_token_ids=[1, 2], sampling=sampling)))
    assert got.accepted.max_tokens == limit - 2 == len(got.samples[0].tokens)
    assert got.samples[0].done.length_reason == pb.LENGTH_REASON_CONTEXT
    sampling.max_tokens = 10**9
    sampling.clamp = True
    got = collect(worker.stub.Generate(pb.GenerateRequest(prompt_token_ids=[1, 2], sampling=sampling)))
    assert len(got.samples[0].tokens) == limit - 2
    assert got.samples[0].done.length_reason == pb.LENGTH_REASON_CONTEXT


def test_large_results_come_in_messages_of_a_mebibyte(start_fake, pb):
    worker = start_fake("--fake_step_ms", "0")
    kinds = [pb.LOGPROB_KIND_RAW, pb.LOGPROB_KIND_TEMPERATURE, pb.LOGPROB_KIND_PROCESSED]
    options = pb.LogprobOptions(kinds=kinds, top_k=64, kept_token_ids=True, prompt=pb.PositionRange())
    prompt = [i % 1000 for i in range(1500)]
    sampling = {"max_tokens": 2500}
    messages = list(worker.stub.Generate(request(pb, prompt_token_ids=prompt, logprobs=options, sampling=sampling)))
    result = Result()
    for message in messages:
        add(result, message)
    assert result.prompt_positions == list(range(1, 1500))
    sample = result.samples[0]
    assert len(sample.tokens) == len(sample.logprobs["raw"]) == len(sample.logprobs["processed"]) == 2500
    with_tokens = [m for m in messages if m.token_ids]
    assert len(with_tokens) >= 3 and sum(m.ByteSize() for m in with_tokens) > 2 << 20
    for m in with_tokens:
        rows = len(m.token_ids)
        assert m.logprobs.top_k == 64
        for kind in ("raw", "temperature", "processed"):
            assert len(getattr(m.logprobs, f"top_{kind}_ids")) == rows * 64
            assert len(getattr(m.logprobs, f"top_{kind}_logprobs")) == rows * 64
        # The fake's filter keeps two tokens: the other 62 places are empty.
        assert m.logprobs.top_processed_ids[2:64] == [-1] * 62
        assert m.logprobs.top_processed_logprobs[2] == float("-inf")
        assert m.logprobs.kept_counts == [2] * rows and m.logprobs.kept_ids == [3, 5] * rows


def test_score(start_fake, pb):
    worker = start_fake("--fake_step_ms", "0")
    tokens = [i % 1000 for i in range(4000)]
    options = pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW, pb.LOGPROB_KIND_TEMPERATURE], top_k=64)
    position, raw, done = 1, [], None
    for number, message in enumerate(worker.stub.Score(pb.ScoreRequest(prompt_token_ids=tokens, logprobs=options))):
        assert message.ByteSize() <= 1 << 20 and done is None
        assert message.HasField("accepted") == (number == 0)
        assert message.offset == position
        position += len(message.logprobs.raw)
        raw += message.logprobs.raw
        assert len(message.logprobs.top_raw_ids) == 64 * len(message.logprobs.raw)
        done = message.done if message.HasField("done") else None
    assert position == 4000 and len(raw) == 3999
    assert done.finish_reason == pb.FINISH_REASON_SCORED and done.end_offset == 4000

    part = pb.ScoreRequest(prompt_token_ids=tokens, logprobs=options, range=pb.PositionRange(begin=100, end=200))
    assert [x for m in worker.stub.Score(part) for x in m.logprobs.raw] == raw[99:199]
    single = pb.ScoreRequest(prompt_token_ids=[3], logprobs=options)
    assert [m.done.finish_reason for m in worker.stub.Score(single)] == [0, pb.FINISH_REASON_SCORED]


def test_cancelling_frees_the_sequences_within_two_steps(start_fake, pb):
    worker = start_fake("--fake_step_ms", "50")
    call = worker.stub.Generate(request(pb, request_id="gone", n=4, stream_interval=1, sampling={"max_tokens": 4000}))
    next(call), next(call)
    assert load(worker, pb).running_sequences == 4
    before = load(worker, pb).steps
    call.cancel()
    steps = wait_for(lambda: (now := load(worker, pb)).running_sequences == 0 and now.steps)
    assert steps - before <= 3  # two, and the one in progress
    with fails_with(grpc.StatusCode.NOT_FOUND):
        list(worker.stub.Generate(pb.GenerateRequest(request_id="gone", attach=pb.Attach())))
    # Its id is free at once.
    assert len(collect(worker.stub.Generate(request(pb, request_id="gone", sampling={"max_tokens": 2}))).samples) == 1


def test_time_budget_returns_a_partial(start_fake, pb):
    worker = start_fake("--fake_step_ms", "10")
    got = collect(worker.stub.Generate(request(pb, n=2, time_budget_ms=300, sampling={"max_tokens": 4000})))
    for sample in got.samples.values():
        assert sample.done.finish_reason == pb.FINISH_REASON_ABORTED
        assert sample.done.abort_reason == pb.ABORT_REASON_TIME_BUDGET
        assert 5 <= len(sample.tokens) <= 40


def test_deadline_returns_a_partial_in_time(start_fake, pb):
    worker = start_fake("--fake_step_ms", "10")
    got = collect(worker.stub.Generate(request(pb, sampling={"max_tokens": 4000}), timeout=1.5))
    sample = got.samples[0]
    assert sample.done.abort_reason == pb.ABORT_REASON_DEADLINE
    assert len(sample.tokens) >= 10
    assert load(worker, pb).running_sequences == 0


def test_partial_is_kept_when_the_deadline_fires_first(start_fake, pb):
    worker = start_fake("--fake_step_ms", "10", "--max_sequences", "1")
    call = worker.stub.Generate(request(pb, request_id="late", stream_interval=1, sampling={"max_tokens": 4000}), timeout=1.0)
    received = Result()
    add(received, next(call))
    add(received, next(call))
    time.sleep(1.3)  # not reading: the client's own timer ends the call while the partial waits
    with fails_with(grpc.StatusCode.DEADLINE_EXCEEDED):
        for message in call:  # what gRPC had already taken in
            add(received, message)
    offset = received.samples[0].end
    attach = pb.Attach(samples=[pb.Attach.SampleOffset(sample_index=0, offset=offset)])
    rest = collect(worker.stub.Generate(pb.GenerateRequest(request_id="late", attach=attach)))
    assert rest.samples[0].begin == offset
    assert rest.samples[0].done.abort_reason == pb.ABORT_REASON_DEADLINE


def test_abort(start_fake, pb):
    worker = start_fake("--fake_step_ms", "5")
    call = worker.stub.Generate(request(pb, request_id="r", n=2, first_sample_index=4, stream_interval=1, sampling={"max_tokens": 4000}))
    result = Result()
    while len(result.samples) < 2:
        add(result, next(call))
    abort = worker.stub.Abort
    assert abort(pb.AbortRequest(request_id="r", sample_index=5)).found
    while result.samples[5].done is None:
        add(result, next(call))
    assert result.samples[5].done.abort_reason == pb.ABORT_REASON_CLIENT
    assert not abort(pb.AbortRequest(request_id="r", sample_index=5)).found
    more = result.samples[4].end
    while result.samples[4].end < more + 5:
        add(result, next(call))
    assert abort(pb.AbortRequest(request_id="r")).found
    for message in call:
        add(result, message)
    assert result.samples[4].done.abort_reason == pb.ABORT_REASON_CLIENT
    assert not abort(pb.AbortRequest(request_id="r")).found
    assert not abort(pb.AbortRequest(request_id="never")).found


def test_same_id_in_flight(start_fake, pb):
    worker = start_fake("--fake_step_ms", "5")
    call = worker.stub.Generate(request(pb, request_id="twice", stream_interval=1))
    next(call)
    with fails_with(grpc.StatusCode.ALREADY_EXISTS) as error:
        list(worker.stub.Generate(request(pb, request_id="twice")))
    assert "request_id" in error[0].details()
    list(call)
    # Finished: the id may be used again, at once.
    for _ in range(20):
        collect(worker.stub.Generate(request(pb, request_id="twice", sampling={"max_tokens": 1})))


def test_reattach_to_a_finished_result(start_fake, pb):
    worker = start_fake()
    options = pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW], prompt=pb.PositionRange())
    whole = collect(worker.stub.Generate(request(pb, request_id="keep", n=2, logprobs=options)))
    again = collect(worker.stub.Generate(pb.GenerateRequest(request_id="keep", attach=pb.Attach())))
    assert again.accepted == whole.accepted
    assert again.prompt_raw == whole.prompt_raw and len(again.prompt_raw) == 2
    for i, sample in whole.samples.items():
        assert again.samples[i].tokens == sample.tokens
        assert again.samples[i].logprobs == sample.logprobs
        assert again.samples[i].done == sample.done

    offsets = [pb.Attach.SampleOffset(sample_index=1, offset=60), pb.Attach.SampleOffset(sample_index=0, offset=64)]
    attach = pb.Attach(samples=offsets, prompt_position=3)
    tail = collect(worker.stub.Generate(pb.GenerateRequest(request_id="keep", attach=attach)))
    assert tail.prompt_positions == []
    assert tail.samples[0].begin == 64 and tail.samples[0].tokens == []
    assert tail.samples[1].tokens == whole.samples[1].tokens[60:]


def test_reattach_errors(start_fake, pb):
    worker = start_fake("--reattach_seconds", "0.5")
    collect(worker.stub.Generate(request(pb, request_id="x")))

    def attach(request_id, **sample):
        samples = [pb.Attach.SampleOffset(**sample)] if sample else []
        return list(worker.stub.Generate(pb.GenerateRequest(request_id=request_id, attach=pb.Attach(samples=samples))))

    with fails_with(grpc.StatusCode.NOT_FOUND):
        attach("y")
    with fails_with(grpc.StatusCode.OUT_OF_RANGE) as error:
        attach("x", sample_index=0, offset=65)
    assert "attach.samples[0].offset" in error[0].details() and "64" in error[0].details()
    with fails_with(grpc.StatusCode.INVALID_ARGUMENT) as error:
        attach("x", sample_index=1, offset=0)
    assert "attach.samples[0].sample_index" in error[0].details()
    assert attach("x")
    time.sleep(1.2)
    with fails_with(grpc.StatusCode.NOT_FOUND):
        attach("x")
    assert load(worker, pb).retained_bytes == 0


def test_detached_request_goes_on(start_fake, pb):
    worker = start_fake("--fake_step_ms", "5")
    sampling = {"max_tokens": 200}
    want = collect(worker.stub.Generate(request(pb, sampling=sampling))).samples[0].tokens
    call = worker.stub.Generate(
        request(pb, request_id="d", stream_interval=1, detach_on_disconnect=True, sampling=sampling)
    )
    result = Result()
    while not result.samples or result.samples[0].end < 20:
        add(result, next(call))
    call.cancel()
    offset = result.samples[0].end
    attach = pb.Attach(samples=[pb.Attach.SampleOffset(sample_index=0, offset=offset)])
    rest = collect(worker.stub.Generate(pb.GenerateRequest(request_id="d", stream_interval=1, attach=attach)))
    assert rest.samples[0].begin == offset
    assert result.samples[0].tokens + rest.samples[0].tokens == want
    assert rest.samples[0].done.finish_reason == pb.FINISH_REASON_LENGTH


def detach_after_first_token(worker, pb, **limits):
    call = worker.stub.Generate(
        request(pb, request_id="d", stream_interval=1, detach_on_disconnect=True, sampling={"max_tokens": 4000}), **limits
    )
    next(call), next(call)
    call.cancel()
    return pb.GenerateRequest(request_id="d", attach=pb.Attach())


def test_an_attached_call_has_its_own_deadline(start_fake, pb):
    worker = start_fake("--fake_step_ms", "10")
    attach = detach_after_first_token(worker, pb)
    sample = collect(worker.stub.Generate(attach, timeout=1.5)).samples[0]
    assert sample.done.abort_reason == pb.ABORT_REASON_DEADLINE
    assert len(sample.tokens) >= 10


def test_a_later_deadline_of_an_attached_call_takes_the_place_of_the_first(start_fake, pb):
    worker = start_fake("--fake_step_ms", "1")
    begin = time.monotonic()
    attach = detach_after_first_token(worker, pb, timeout=2)
    sample = collect(worker.stub.Generate(attach)).samples[0]
    assert len(sample.tokens) == 4000 and sample.done.finish_reason == pb.FINISH_REASON_LENGTH
    assert time.monotonic() - begin > 2, "too fast to have met the first deadline"


def test_second_reader_takes_over(start_fake, pb):
    worker = start_fake("--fake_step_ms", "5")
    first = worker.stub.Generate(request(pb, request_id="t", stream_interval=1, sampling={"max_tokens": 200}))
    next(first), next(first)
    second = worker.stub.Generate(pb.GenerateRequest(request_id="t", stream_interval=1, attach=pb.Attach()))
    next(second)
    with fails_with(grpc.StatusCode.ABORTED):
        list(first)
    result = Result()
    result.messages, result.accepted = 1, True
    for message in second:
        add(result, message)
    assert len(result.samples[0].tokens) == 200


def big_request(pb, **fields):
    """About 1.6 kB a token."""
    kinds = [pb.LOGPROB_KIND_RAW, pb.LOGPROB_KIND_TEMPERATURE, pb.LOGPROB_KIND_PROCESSED]
    return request(
        pb, logprobs=pb.LogprobOptions(kinds=kinds, top_k=64), stream_interval=1, sampling={"max_tokens": 4000}, **fields
    )


def test_reader_past_the_budget_is_cut_and_the_others_go_on(start_fake, pb):
    worker = start_fake("--max_buffered_mb", "2", "--max_retained_mb", "16", "--fake_step_ms", "0.2")
    slow = worker.stub.Generate(big_request(pb, request_id="slow"))
    result = Result()
    add(result, next(slow))
    # A small request beside it is not disturbed, however large the slow one's buffer.
    wait_for(lambda: load(worker, pb).buffered_bytes > 1 << 20)
    beside = collect(worker.stub.Generate(request(pb, stream_interval=1, sampling={"max_tokens": 500})))
    assert len(beside.samples[0].tokens) == 500
    wait_for(lambda: load(worker, pb).running_sequences == 0)
    assert load(worker, pb).buffered_bytes <= 2 << 20
    with fails_with(grpc.StatusCode.RESOURCE_EXHAUSTED) as error:
        for message in slow:
            add(result, message)
    assert int(dict(error[0].trailing_metadata())["retry-after-ms"]) > 0
    offset = result.samples[0].end
    assert result.samples[0].done is None
    attach = pb.Attach(samples=[pb.Attach.SampleOffset(sample_index=0, offset=offset)])
    rest = collect(worker.stub.Generate(pb.GenerateRequest(request_id="slow", attach=attach)))
    assert rest.samples[0].begin == offset and len(rest.samples[0].tokens) > 0
    assert rest.samples[0].done.abort_reason == pb.ABORT_REASON_BUFFER_LIMIT
    assert len(rest.samples[0].logprobs["raw"]) == len(rest.samples[0].tokens)


def test_a_reader_that_keeps_up_is_not_cut_for_waiting_for_the_end(start_fake, pb):
    worker = start_fake("--max_buffered_mb", "0.01", "--fake_step_ms", "0.5")
    whole = collect(worker.stub.Generate(request(pb, n=2, sampling={"max_tokens": 3000})))  # 0.05 MB
    assert [len(whole.samples[i].tokens) for i in range(2)] == [3000, 3000]


def test_slow_reader_within_the_budget_loses_nothing(start_fake, pb):
    worker = start_fake("--fake_step_ms", "0.2")
    call = worker.stub.Generate(big_request(pb))
    result = Result()
    add(result, next(call))
    wait_for(lambda: load(worker, pb).running_sequences == 0, timeout=30)
    for message in call:
        add(result, message)
    assert len(result.samples[0].tokens) == 4000
    assert result.samples[0].done.finish_reason == pb.FINISH_REASON_LENGTH


def test_retained_results_stay_within_their_budget(start_fake, pb):
    worker = start_fake("--max_retained_mb", "4", "--fake_step_ms", "0")
    for i in range(6):
        message = big_request(pb, request_id=f"r{i}")
        message.sampling.max_tokens = 1000
        collect(worker.stub.Generate(message))
    wait_for(lambda: load(worker, pb).retained_bytes <= 4 << 20)
    with fails_with(grpc.StatusCode.NOT_FOUND):
        list(worker.stub.Generate(pb.GenerateRequest(request_id="r0", attach=pb.Attach())))
    assert len(collect(worker.stub.Generate(pb.GenerateRequest(request_id="r5", attach=pb.Attach()))).samples[0].tokens) == 1000


def test_full_queue(start_fake, pb):
    worker = start_fake("--fake_step_ms", "5", "--max_sequences", "1", "--max_waiting_sequences", "2")
    running = worker.stub.Generate(request(pb, stream_interval=1, sampling={"max_tokens": 4000}))
    next(running), next(running)
    waiting = worker.stub.Generate(request(pb, n=2, stream_interval=1))
    next(waiting)
    with fails_with(grpc.StatusCode.RESOURCE_EXHAUSTED) as error:
        list(worker.stub.Generate(request(pb)))
    assert int(dict(error[0].trailing_metadata())["retry-after-ms"]) > 0
    running.cancel()
    assert len(list(waiting)) > 2


def test_min_weight_version(start_fake, pb):
    worker = start_fake("--fake_next_version_seconds", "1.5", "--max_version_wait_seconds", "4")
    version = pb.WeightVersion(epoch=0, step=1)
    assert worker.stub.GetInfo(pb.GetInfoRequest()).weight_version == pb.WeightVersion()
    for limit in ({"timeout": 0.5}, {}):
        with fails_with(grpc.StatusCode.DEADLINE_EXCEEDED):
            budget = 0 if limit else 300
            list(worker.stub.Generate(request(pb, min_weight_version=version, time_budget_ms=budget), **limit))
    waiting = worker.stub.Generate(request(pb, request_id="w", min_weight_version=version))
    wait_for(lambda: load(worker, pb).version_waiting_requests == 1)
    assert worker.stub.Abort(pb.AbortRequest(request_id="w")).found
    assert collect(waiting).samples[0].done.abort_reason == pb.ABORT_REASON_CLIENT
    got = collect(worker.stub.Generate(request(pb, min_weight_version=version)))
    assert got.samples[0].done.version_spans[0].weight_version == version
    score = pb.ScoreRequest(prompt_token_ids=[1, 2], logprobs=pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW]))
    score.min_weight_version.step = 2
    with fails_with(grpc.StatusCode.UNAVAILABLE) as error:
        list(worker.stub.Score(score))
    assert "min_weight_version" in error[0].details() and "retry-after-ms" in dict(error[0].trailing_metadata())


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_that_waits_for_weights_is_accepted_and_its_samples_can_be_aborted(start_fake, pb, n):
    worker = start_fake()
    waiting = worker.stub.Generate(request(pb, n=n, min_weight_version=pb.WeightVersion(step=1)))
    accepted = next(waiting).accepted
    assert accepted.request_id and accepted.seed == 7 and load(worker, pb).version_waiting_requests == 1
    for i in range(n):
        assert worker.stub.Abort(pb.AbortRequest(request_id=accepted.request_id, sample_index=i)).found
    messages = list(waiting)
    assert [m.done.abort_reason for m in messages] == [pb.ABORT_REASON_CLIENT] * n


def test_too_large_a_message(start_fake, pb):
    worker = start_fake("--max_request_bytes", "10000")
    with fails_with(grpc.StatusCode.RESOURCE_EXHAUSTED):
        list(worker.stub.Generate(request(pb, prompt_token_ids=[999] * 20000)))
    assert collect(worker.stub.Generate(request(pb)))


def test_score_is_cancelled(start_fake, pb):
    worker = start_fake("--fake_step_ms", "50")
    options = pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW])
    call = worker.stub.Score(pb.ScoreRequest(prompt_token_ids=[1] * 4000, logprobs=options))
    next(call), next(call)
    call.cancel()
    wait_for(lambda: load(worker, pb).running_sequences == 0)
    partial = list(worker.stub.Score(pb.ScoreRequest(prompt_token_ids=[1] * 4000, logprobs=options, time_budget_ms=400)))
    assert partial[-1].done.finish_reason == pb.FINISH_REASON_ABORTED
    assert 1 < partial[-1].done.end_offset < 4000
    assert sum(len(m.logprobs.raw) for m in partial) == partial[-1].done.end_offset - 1
