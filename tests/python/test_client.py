"""RolloutClient against real workers."""

import asyncio
import signal
import threading
import time

import numpy as np
import pytest
import torch
from dropping_proxy import DroppingProxy
from fake_rollout import FakeRollout, token

import lockstep
from lockstep import RolloutClient, SamplingParams
from lockstep._assembly import Assembly
from lockstep._pool import Pool
from lockstep.v1 import rollout_pb2 as pb

PROMPTS = [[5, 6, 7], [100, 200, 300, 400], [9]]


@pytest.fixture(scope="module")
def two(start_worker, tiny_model):
    return [start_worker(tiny_model, "--threads", "1") for _ in range(2)]


@pytest.fixture
def client(two):
    with RolloutClient([w.data for w in two], timeout=60) as client:
        yield client


def same(a, b):
    assert [t.tolist() for t in a.tokens] == [t.tolist() for t in b.tokens]
    for x, y in zip(a.logprobs, b.logprobs, strict=True):
        assert np.array_equal(x.view(np.int32), y.view(np.int32))


def test_generate_and_score_agree_in_bits(client):
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=20, ignore_eos=True)
    rollouts = client.generate(PROMPTS, params, n=2, logprobs=("temperature", "raw"), top_logprobs=4)
    assert len(rollouts) == 6 and [s.prompt_index for s in rollouts] == [0, 0, 1, 1, 2, 2]
    assert {s.finish_reason for s in rollouts} == {"length"} and {s.reason for s in rollouts} == {"max_tokens"}
    assert all(s.version_spans == [((0, 0), (0, 0), 0, 20)] and not s.mixed_state for s in rollouts)
    assert rollouts[0].top["raw"][0].shape == (20, 4)
    for kind in ("temperature", "raw"):
        scores = client.score(rollouts.sequences, kind=kind, temperature=0.7)
        for sample, score in zip(rollouts, scores, strict=True):
            got = sample.logprobs_by_kind[kind]
            assert np.array_equal(got.view(np.int32), score[-len(sample) :].view(np.int32))
    same(rollouts, client.generate(PROMPTS, params, n=2))
    assert len(list(rollouts.groups())) == 3


def test_kept_token_ids(client):
    """What a filter kept renormalises to the "processed" log-probabilities; without a filter nothing is listed."""
    params = SamplingParams(temperature=0.9, top_k=5, seed=4, max_tokens=12, ignore_eos=True)
    rollouts = client.generate(
        PROMPTS, params, logprobs=("processed", "temperature"), top_logprobs=8, kept_token_ids=True
    )
    for sample in rollouts:
        assert [len(ids) for ids in sample.kept] == [5] * 12
        ids, logprobs = sample.top["temperature"]
        for t, kept in enumerate(sample.kept):
            assert sample.tokens[t] in kept and kept.tolist() == sorted(ids[t][:5].tolist())
            share = np.exp(logprobs[t][:5].astype(np.float64)).sum()
            processed = sample.logprobs_by_kind["processed"][t]
            assert abs(processed - (sample.logprobs_by_kind["temperature"][t] - np.log(share))) < 1e-5
    plain = SamplingParams(seed=4, max_tokens=3, ignore_eos=True)
    assert client.generate(PROMPTS, plain, logprobs=(), kept_token_ids=True)[0].kept == [None] * 3
    assert client.generate(PROMPTS, plain)[0].kept is None


def same_prompts(a, b):
    for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True):
        assert x.keys() == y.keys()
        assert all(np.array_equal(x[kind].view(np.int32), y[kind].view(np.int32)) for kind in x)


def test_prompt_logprobs(client):
    """Of every prompt position but the first, in bits what score() gives; the samples are as without them."""
    prompts = [*PROMPTS, np.random.default_rng(0).integers(0, 1024, 700)]
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=4, ignore_eos=True)
    rollouts = client.generate(prompts, params, n=2, logprobs=("processed", "temperature", "raw"), prompt_logprobs=True)
    assert [set(of) for of in rollouts.prompt_logprobs] == [{"temperature", "raw"}] * 4
    for kind in ("temperature", "raw"):
        scores = client.score(prompts, kind=kind, temperature=0.7)
        for prompt, of, score in zip(prompts, rollouts.prompt_logprobs, scores, strict=True):
            assert of[kind].dtype == np.float32 and of[kind].shape == (len(prompt) - 1,)
            assert np.array_equal(of[kind].view(np.int32), score.view(np.int32))
    plain = client.generate(prompts, params, n=2, logprobs="processed")
    same(rollouts, plain)
    assert plain.prompt_logprobs is None
    with pytest.raises(lockstep.InvalidRequest, match="prompt_logprobs: .*want 'raw' or 'temperature'"):
        client.generate(prompts, params, logprobs="processed", prompt_logprobs=True)


def test_prompt_logprobs_come_whole_and_once():
    def part(begin, values):
        return pb.GenerateResponse(prompt_logprobs=dict(begin=begin, logprobs=dict(raw=values)))

    assembly = Assembly(0, 0, 1, 0, ("raw",), False, ("raw",), 4)
    assert assembly.add(part(1, [-1.0, -2.0]), "w") == 0 and assembly.next_prompt_position == 3
    for wrong in (part(2, [-2.0]), part(4, [-4.0]), part(3, [-3.0, -4.0])):
        with pytest.raises(lockstep.WorkerDefect, match="want 3 to 3"):
            assembly.add(wrong, "w")
    done = pb.Done(finish_reason=pb.FINISH_REASON_LENGTH)
    assembly.add(pb.GenerateResponse(done=done), "w")
    with pytest.raises(lockstep.WorkerDefect, match="2 prompt log-probabilities of 3"):
        assembly.prompt_logprobs()
    assert assembly.wants_prompt
    assembly.restart_prompt()
    assembly.add(part(1, [-1.0, -2.0, -3.0]), "w")
    assert assembly.prompt_logprobs()["raw"].tolist() == [-1, -2, -3] and not assembly.wants_prompt


def test_padded(client):
    rollouts = client.generate(PROMPTS, SamplingParams(seed=1, max_tokens=5, ignore_eos=True))
    padded = rollouts.padded(pad_id=1, framework="torch", multiple_of=8)
    assert padded.input_ids.shape == (3, 16) and padded.input_ids.dtype == torch.int64
    for row, (prompt, sample) in enumerate(zip(PROMPTS, rollouts, strict=True)):
        end = len(prompt) + 5
        assert padded.input_ids[row].tolist() == prompt + sample.tokens.tolist() + [1] * (16 - end)
        assert padded.attention_mask[row].sum() == end
        assert padded.completion_mask[row].nonzero().flatten().tolist() == list(range(len(prompt), end))
        assert torch.equal(padded.logprobs[row, len(prompt) : end], torch.tensor(rollouts.logprobs[row]))
    assert rollouts.padded(1).logprobs.dtype == np.float32 and padded.sample_mask.all()


def test_equal_prompts_get_other_draws(client):
    rollouts = client.generate([[5, 6, 7]] * 3, SamplingParams(seed=3, max_tokens=20, ignore_eos=True), n=2)
    assert len({t.tobytes() for t in rollouts.tokens}) == 6
    assert [s.sample_index for s in rollouts] == list(range(6))
    unseeded = client.generate([[5, 6, 7]] * 3, SamplingParams(max_tokens=20, ignore_eos=True))
    assert len({s.seed for s in unseeded}) == 3


def test_work_spreads_and_sessions_stay(client, two):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    rollouts = client.generate([[i + 2] for i in range(24)], params)
    assert {s.worker for s in rollouts} == {w.data for w in two}
    session = client.generate([[i + 2] for i in range(12)], params, session_id="episode 7")
    assert len({s.worker for s in session}) == 1


def test_aio(two):
    async def run():
        async with lockstep.aio.RolloutClient([w.data for w in two]) as client:
            params = SamplingParams(seed=8, max_tokens=10)
            a, b = await asyncio.gather(client.generate(PROMPTS, params), client.generate(PROMPTS, params))
            return a, b, await client.info(), await client.load()

    a, b, info, load = asyncio.run(run())
    same(a, b)
    assert set(info) == set(load) == {w.data for w in two}


@pytest.mark.parametrize(
    "fields,text",
    [
        ({"temperature": -1.0}, "sampling.temperature: -1.0, want 0"),
        ({"temperature": float("nan")}, "sampling.temperature: nan"),
        ({"top_p": 0.0}, "sampling.top_p: 0.0, want 0 < top_p"),
        ({"seed": 1 << 64}, "sampling.seed"),
        ({"max_tokens": 3, "min_tokens": 4}, "sampling.min_tokens: 4, want 0 to max_tokens .3"),
        ({"stop_strings": "abc"}, "sampling.stop_strings"),
        ({"bad_words": [[]]}, "sampling.bad_words"),
    ],
)
def test_sampling_params_say_what_is_wrong(fields, text):
    with pytest.raises(lockstep.InvalidRequest, match=text):
        SamplingParams(**fields)


def test_errors_name_field_and_worker(client, two):
    with pytest.raises(lockstep.InvalidRequest, match="token_ids") as error:
        client.generate([[1, 2, 10**6]])
    assert error.value.code.name == "INVALID_ARGUMENT" and error.value.worker in {w.data for w in two}
    for prompts, text in (([[]], r"prompts\[0\]"), ([[1], "text"], r"prompts\[1\]: a string"), ([[-1]], "-1")):
        with pytest.raises(lockstep.InvalidRequest, match=text):
            client.generate(prompts)
    with pytest.raises(lockstep.InvalidRequest, match="logprobs: 'rwa'"):
        client.generate([[1]], logprobs="rwa")


def test_time_budget_returns_partials(start_fake):
    fake = start_fake("--fake_step_ms", "20")
    with RolloutClient(fake.data) as client:
        rollouts = client.generate([[1, 2]], SamplingParams(max_tokens=4000, ignore_eos=True), time_budget_s=0.5)
    assert rollouts.finish_reasons == ["aborted"] and rollouts[0].reason == "time_budget"
    assert 0 < len(rollouts[0]) < 4000 and not rollouts.padded(0).sample_mask.any()


def test_nobody_there():
    with RolloutClient("127.0.0.1:1", connect_timeout=0.5) as client:
        begin = time.monotonic()
        with pytest.raises(lockstep.WorkerUnavailable, match="127.0.0.1:1"):
            client.generate([[1]])
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize("on_loss", ["regenerate", "continue"])
def test_a_killed_worker_loses_and_doubles_nothing(start_worker, tiny_model, on_loss):
    workers = [start_worker(tiny_model, "--threads", "1") for _ in range(2)]
    params = SamplingParams(seed=11, max_tokens=1500, ignore_eos=True)
    prompts = [[i + 3, 7] for i in range(4)]
    options = {"on_loss": on_loss, "reattach_s": 0.3, "health_interval": 0.5, "timeout": 120}
    with RolloutClient([w.data for w in workers], **options) as client:
        result = {}
        thread = threading.Thread(
            target=lambda: result.update(r=client.generate(prompts, params, n=2, prompt_logprobs=True))
        )
        thread.start()
        time.sleep(0.8)
        busy = client.load()
        assert all(load.running_sequences for load in busy.values()), "both must be at work when one is killed"
        workers[0].process.kill()
        thread.join(110)
        rollouts = result["r"]
        assert {s.worker for s in rollouts} == {workers[1].data}
        assert all(len(s) == 1500 for s in rollouts)
        again = client.generate(prompts, params, n=2, prompt_logprobs=True)
        same(rollouts, again)
        same_prompts(rollouts, again)
        for sample in rollouts:
            spans = sample.version_spans
            assert spans[0].begin == 0 and spans[-1].end == 1500
            assert all(a.end == b.begin for a, b in zip(spans, spans[1:], strict=False))
        continued = [s for s in rollouts if s.version_spans[0].weights is None]
        assert bool(continued) == (on_loss == "continue")


def test_a_full_queue_is_waited_for(start_worker, tiny_model):
    worker = start_worker(tiny_model, "--threads", "1", "--max_sequences", "2", "--max_waiting_sequences", "2")
    with RolloutClient(worker.data, timeout=120) as client:
        rollouts = client.generate([[i + 3] for i in range(12)], SamplingParams(max_tokens=100, ignore_eos=True))
    assert [len(s) for s in rollouts] == [100] * 12


def test_cancel_aborts_at_the_worker(two):
    async def run():
        async with lockstep.aio.RolloutClient(two[0].data) as client:
            task = asyncio.create_task(client.generate([[1]], SamplingParams(max_tokens=60000, ignore_eos=True)))
            while not (await client.load())[two[0].data].running_sequences:
                await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(100):
                if not (await client.load())[two[0].data].running_sequences:
                    return True
                await asyncio.sleep(0.05)

    assert asyncio.run(run())


LONG = SamplingParams(max_tokens=4000, ignore_eos=True)


def when_running(worker, count, action):
    """Calls `action` on a thread once `count` samples run at `worker`."""

    def wait():
        while worker.stub.GetLoad(pb.GetLoadRequest()).running_sequences < count:
            time.sleep(0.02)
        action()

    threading.Thread(target=wait).start()


def freed(worker):
    """Whether nothing runs at `worker` soon."""
    for _ in range(100):
        load = worker.stub.GetLoad(pb.GetLoadRequest())
        if load.running_sequences + load.waiting_sequences == 0:
            return True
        time.sleep(0.02)
    return False


def test_ctrl_c_aborts_before_the_client_is_closed(start_fake):
    fake = start_fake("--fake_step_ms", "20")
    main = threading.main_thread().ident
    # A shell starts what runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), RolloutClient(fake.data) as client:
            when_running(fake, 6, lambda: signal.pthread_kill(main, signal.SIGINT))
            client.generate([[1], [2], [3]], LONG, n=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert freed(fake)


def test_an_error_aborts_the_other_prompts(start_fake, monkeypatch):
    fake = start_fake("--fake_step_ms", "20")
    stock = lockstep.aio.RolloutClient._read

    async def read(self, assembly, request, *arguments):
        while 10**6 in request.prompt_token_ids and fake.stub.GetLoad(pb.GetLoadRequest()).running_sequences < 3:
            await asyncio.sleep(0.02)
        async for message in stock(self, assembly, request, *arguments):
            yield message

    async def run():
        async with lockstep.aio.RolloutClient(fake.data) as client:
            await client.generate([[1], [2], [3], [10**6]], LONG)

    monkeypatch.setattr(lockstep.aio.RolloutClient, "_read", read)
    with pytest.raises(lockstep.InvalidRequest):
        asyncio.run(run())
    assert freed(fake)


def test_a_closed_client_takes_nothing(start_fake):
    fake = start_fake()
    client = RolloutClient(fake.data)
    client.generate([[1]], SamplingParams(max_tokens=1))
    client.close()
    with pytest.raises(lockstep.LockstepError, match="the client is closed"):
        client.generate([[1]], SamplingParams(max_tokens=1))


def interrupted(fake, proxy, then):
    """Cancels a call through `proxy` once its connection was dropped; `then`: called in between. Closes the client."""

    async def run():
        async with lockstep.aio.RolloutClient(proxy.address, reattach_s=60) as client:
            task = asyncio.create_task(client.generate([[1], [2]], LONG))
            while fake.stub.GetLoad(pb.GetLoadRequest()).running_sequences < 2:
                await asyncio.sleep(0.02)
            assert proxy.drop()
            await then()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())


def test_re_attached_requests_are_aborted(start_fake):
    fake = start_fake("--fake_step_ms", "20")
    proxy = DroppingProxy(fake.data)

    async def reattached():
        while not proxy.connections:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)

    interrupted(fake, proxy, reattached)
    assert freed(fake)
    proxy.close()


def test_an_abort_waits_for_the_connection(start_fake):
    fake = start_fake("--fake_step_ms", "20")
    proxy = DroppingProxy(fake.data)

    async def unreachable():
        proxy.refuse = True
        proxy.drop()
        await asyncio.sleep(0.5)
        threading.Timer(1, lambda: setattr(proxy, "refuse", False)).start()

    interrupted(fake, proxy, unreachable)
    assert freed(fake)
    proxy.close()


def test_close_waits_seconds_at_most_for_a_worker_that_is_gone(start_fake):
    fake = start_fake("--fake_step_ms", "20")
    with RolloutClient(fake.data, reattach_s=0.1, connect_timeout=0.5) as client:
        when_running(fake, 1, fake.process.kill)
        with pytest.raises(lockstep.WorkerUnavailable):
            client.generate([[1]], LONG)
        begin = time.monotonic()
    assert time.monotonic() - begin < 8


@pytest.mark.parametrize("noticed_by", ["checks", "pings"])
def test_a_worker_that_goes_silent_is_left(start_fake, monkeypatch, noticed_by):
    """Stopped, it holds its connections and answers nothing."""
    fakes = [start_fake("--fake_step_ms", "5") for _ in range(2)]
    sampling = SamplingParams(seed=5, max_tokens=400, ignore_eos=True)
    prompts = [[i + 1, 2] for i in range(8)]
    monkeypatch.setattr(lockstep.aio, "_CHECK_S", 0.5)
    interval = 0.2 if noticed_by == "checks" else 1000
    with RolloutClient([f.data for f in fakes], health_interval=interval) as client:
        want = client.generate(prompts, sampling, n=2, prompt_logprobs=True)
        assert {s.worker for s in want} == {f.data for f in fakes}
        before = fakes[0].stub.GetLoad(pb.GetLoadRequest()).generated_tokens
        when_running(fakes[0], 2, lambda: fakes[0].process.send_signal(signal.SIGSTOP))
        begin = time.monotonic()
        got = client.generate(prompts, sampling, n=2, prompt_logprobs=True)
        assert time.monotonic() - begin < (20 if noticed_by == "checks" else 60)
        same(got, want)
        same_prompts(got, want)
        assert {s.worker for s in got} == {fakes[1].data}
        fakes[0].process.send_signal(signal.SIGCONT)
        assert freed(fakes[0])
        generated = fakes[0].stub.GetLoad(pb.GetLoadRequest()).generated_tokens - before
        assert noticed_by == "pings" or generated < 2 * 400, "aborted as soon as it went on"


def test_score_leaves_a_worker_that_goes_silent(start_fake, monkeypatch):
    fakes = [start_fake("--fake_step_ms", "20") for _ in range(2)]
    monkeypatch.setattr(lockstep.aio, "_CHECK_S", 0.5)
    sequences = [[i + 1] * 2000 for i in range(8)]
    with RolloutClient([f.data for f in fakes], health_interval=0.2) as client:
        when_running(fakes[0], 1, lambda: fakes[0].process.send_signal(signal.SIGSTOP))
        begin = time.monotonic()
        got = client.score(sequences)
        assert time.monotonic() - begin < 20 and [len(g) for g in got] == [1999] * 8
        fakes[0].process.send_signal(signal.SIGCONT)


def test_calls_in_progress_fail_when_the_client_is_closed(start_fake):
    fake = start_fake("--fake_step_ms", "20")

    async def run():
        client = lockstep.aio.RolloutClient(fake.data)
        call = asyncio.create_task(client.generate([[1], [2]], LONG))
        while fake.stub.GetLoad(pb.GetLoadRequest()).running_sequences < 2:
            await asyncio.sleep(0.02)
        await client.close()
        with pytest.raises(lockstep.LockstepError, match="the client is closed"):
            await call

    asyncio.run(run())
    assert freed(fake)


@pytest.fixture
def start_broken():
    """start_broken(broken) -> FakeRollout"""
    started = []

    def start(broken):
        started.append(FakeRollout(broken).start())
        return started[-1]

    yield start
    for fake in started:
        fake.server.stop(0)


def test_a_version_that_does_not_come_is_a_refusal_although_the_request_was_accepted(start_broken):
    fake = start_broken({})
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    with RolloutClient([fake.address]) as client:
        fake.refusals = 2
        assert len(client.generate([[5, 6]], sampling, timeout=30)) == 1
        assert len(fake.requests) == 3
        fake.refusals = 100
        with pytest.raises(lockstep.LockstepError, match="min_weight_version: it did not come"):
            client.generate([[5, 6]], sampling, timeout=30)


def whole(rollouts, count):
    """Every sample has `count` tokens, each with what belongs to it."""
    for sample in rollouts:
        ids = [token(sample.sample_index, position) for position in range(count)]
        assert sample.tokens.tolist() == ids and [k.tolist() for k in sample.kept] == [[i] for i in ids]
        assert sample.logprobs_by_kind["temperature"].tolist() == [-i / 16 for i in ids]
        assert sample.top["temperature"][0].tolist() == [[i, i + 1] for i in ids]
        assert sample.finish_reason == "length"
        assert [s.begin for s in sample.version_spans] == [0, *(s.end for s in sample.version_spans)][:-1]
        assert sample.version_spans[-1].end == count


@pytest.mark.parametrize("on_loss", ["regenerate", "continue"])
def test_samples_that_a_stop_cut_off_are_not_finished_if_the_stream_breaks(start_broken, on_loss):
    shutdown = pb.Done(finish_reason=pb.FINISH_REASON_ABORTED, abort_reason=pb.ABORT_REASON_SHUTDOWN)
    fake = start_broken({0: (3, shutdown), 1: (2, None)})
    with RolloutClient(fake.address, on_loss=on_loss, timeout=30) as client:
        whole(client.generate([[1]], SamplingParams(max_tokens=6), n=2, top_logprobs=2, kept_token_ids=True), 6)
    first, *again = fake.requests
    assert first.n == 2 and sorted(r.first_sample_index for r in again) == [0, 1]


def test_a_whole_sample_without_its_end_is_continued(start_broken):
    fake = start_broken({0: (6, None), 1: (0, None)})
    with RolloutClient(fake.address, on_loss="continue", timeout=30) as client:
        rollouts = client.generate([[1]], SamplingParams(max_tokens=6), n=2, top_logprobs=2, kept_token_ids=True)
    whole(rollouts, 6)
    assert rollouts[0].version_spans == [(None, None, 0, 5), ((0, 0), (0, 0), 5, 6)]
    prefixes = {r.first_sample_index: list(r.generated_prefix_ids) for r in fake.requests[1:]}
    assert prefixes == {0: [token(0, position) for position in range(5)], 1: []}


def test_a_request_too_large_fails_at_once(start_fake):
    fake = start_fake("--max_request_bytes", "4096")
    with RolloutClient(fake.data, timeout=60) as client:
        for call in (client.generate, client.score):
            begin = time.monotonic()
            with pytest.raises(lockstep.InvalidRequest, match=r"the request has \d+ bytes, want at most 4096") as error:
                call([[900] * 3000])
            assert time.monotonic() - begin < 10 and error.value.worker == fake.data


def test_pool():
    pool = Pool(["a", "b", "c"])
    assert pool.pick() is None
    for worker in pool.workers:
        worker.healthy = True
    pool.workers[0].in_flight, pool.workers[1].reported = 3, 2
    assert pool.pick().address == "c" and pool.pick(exclude=["c"]).address == "b"
    homes = {s: pool.pick(s).address for s in map(str, range(50))}
    assert set(homes.values()) == {"a", "b", "c"}
    pool.workers[2].healthy = False
    assert all(pool.pick(s).address == home for s, home in homes.items() if home != "c")
    with pytest.raises(ValueError, match="HOST:PORT"):
        Pool([])


def test_text(tiny_model):
    from lockstep import text

    tokenizer = text.load_tokenizer(tiny_model)
    ids = text.encode(tokenizer, ["37+45=", "In the beginning"])
    assert text.decode(tokenizer, ids) == ["37+45=", "In the beginning"]


def test_a_broken_connection_is_read_on(start_fake):
    fake = start_fake("--fake_step_ms", "5")
    params = SamplingParams(seed=4, max_tokens=400, ignore_eos=True)
    proxy = DroppingProxy(fake.data)
    with RolloutClient(fake.data) as direct, RolloutClient(proxy.address, reattach_s=10) as client:
        want = direct.generate([[1, 2, 3]], params, n=3, prompt_logprobs=True)
        before = direct.load()[fake.data].generated_tokens
        dropped = []
        for seconds in (0.7, 1.4):
            threading.Timer(seconds, lambda: dropped.append(proxy.drop())).start()
        got = client.generate([[1, 2, 3]], params, n=3, prompt_logprobs=True)
        same(got, want)
        same_prompts(got, want)
        assert len(dropped) == 2 and all(dropped)
        assert direct.load()[fake.data].generated_tokens == before + 1200, "re-attached, not generated again"
    proxy.close()


def test_progress_bar(client, capfd):
    pytest.importorskip("tqdm")
    client.generate(PROMPTS, SamplingParams(max_tokens=3), n=2, progress=True)
    assert "6/6" in capfd.readouterr().err
    client.generate(PROMPTS, SamplingParams(max_tokens=3), progress=False)
    assert capfd.readouterr().err == ""


def test_a_queue_that_stays_full_says_so(start_worker, tiny_model):
    worker = start_worker(tiny_model, "--threads", "1", "--max_sequences", "1", "--max_waiting_sequences", "1")
    long = SamplingParams(max_tokens=60_000, ignore_eos=True)
    with RolloutClient(worker.data) as busy, RolloutClient(worker.data) as client:
        thread = threading.Thread(target=lambda: busy.generate([[1], [2]], long, time_budget_s=6))
        thread.start()
        while busy.load()[worker.data].waiting_sequences < 1:
            time.sleep(0.05)
        with pytest.raises(lockstep.Overloaded) as error:
            client.generate([[3]], long, timeout=1.5)
        assert error.value.worker == worker.data and error.value.retry_after_s > 0
        thread.join()
