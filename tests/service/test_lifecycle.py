"""The worker as a process: command line, ready line, health, reflection, shutdown."""

import signal
import subprocess
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from streams import Result, add, collect, fails_with, wait_for

LOOPBACK = ["--listen", "127.0.0.1:0", "--control_listen", "127.0.0.1:0"]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def request(pb, max_tokens=4000, **fields):
    sampling = pb.SamplingParams(seed=7, max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(prompt_token_ids=[5, 6, 7], sampling=sampling, stream_interval=1, **fields)


def started(call, result):
    """Reads until the first token."""
    while not result.samples:
        add(result, next(call))


def finish(call, result):
    for message in call:
        add(result, message)
    return result


def test_ready_line_has_two_open_ports(start_fake, pb):
    worker = start_fake()
    assert worker.data.startswith("127.0.0.1:") and worker.control.startswith("127.0.0.1:")
    assert worker.data != worker.control and not worker.data.endswith(":0")
    assert collect(worker.stub.Generate(request(pb, max_tokens=3)))
    worker.terminate()
    assert worker.wait() == 0
    assert worker.process.stdout.read() == "", "standard output is for the ready line"


def test_health(start_fake):
    worker = start_fake()
    with grpc.insecure_channel(worker.control) as control:
        for channel, services in ((worker.channel, ["", "lockstep.v1.Rollout"]), (control, [""])):
            stub = health_pb2_grpc.HealthStub(channel)
            for service in services:
                assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
            with fails_with(grpc.StatusCode.NOT_FOUND):
                stub.Check(health_pb2.HealthCheckRequest(service="nothing"))


def test_reflection(start_fake):
    worker = start_fake()
    assert "lockstep.v1.Rollout" in ProtoReflectionDescriptorDatabase(worker.channel).get_services()
    methods = ProtoReflectionDescriptorDatabase(worker.channel).FindFileContainingSymbol("lockstep.v1.Rollout").service[0].method
    assert [m.name for m in methods] == ["Generate", "Score", "Abort", "GetInfo", "GetLoad"]
    with grpc.insecure_channel(worker.control) as control:
        services = ProtoReflectionDescriptorDatabase(control).get_services()
        assert "lockstep.v1.Rollout" not in services, "the control port has no data plane"
        assert services


def test_sigterm_lets_requests_finish(start_fake, pb):
    worker = start_fake("--fake_step_ms", "10")
    call = worker.stub.Generate(request(pb, max_tokens=200))
    result = Result()
    started(call, result)
    watch = health_pb2_grpc.HealthStub(worker.channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == SERVING
    worker.terminate()
    assert next(watch).status == NOT_SERVING
    with fails_with(grpc.StatusCode.UNAVAILABLE) as error:
        list(worker.stub.Generate(request(pb)))
    assert "draining" in error[0].details() and "retry-after-ms" in dict(error[0].trailing_metadata())
    assert worker.stub.GetLoad(pb.GetLoadRequest()).draining
    finish(call, result)
    assert len(result.samples[0].tokens) == 200
    assert result.samples[0].done.finish_reason == pb.FINISH_REASON_LENGTH
    # The watch is still open, as gRPC's own health checks are for as long as their channel lives.
    begin = time.monotonic()
    assert worker.wait() == 0
    assert time.monotonic() - begin < 5


def test_drain_time_ends_requests_with_partials(start_fake, pb):
    worker = start_fake("--fake_step_ms", "10", "--drain_seconds", "0.5")
    waiting = worker.stub.Generate(request(pb, min_weight_version=pb.WeightVersion(step=1)))
    wait_for(lambda: worker.stub.GetLoad(pb.GetLoadRequest()).version_waiting_requests == 1)
    call = worker.stub.Generate(request(pb))
    result = Result()
    started(call, result)
    begin = time.monotonic()
    worker.terminate()
    finish(call, result)
    assert result.samples[0].done.abort_reason == pb.ABORT_REASON_SHUTDOWN
    assert len(result.samples[0].tokens) >= 20
    with fails_with(grpc.StatusCode.UNAVAILABLE):
        list(waiting)
    assert worker.wait() == 0
    assert time.monotonic() - begin < 5


def test_sigterm_with_a_reader_that_does_not_read(start_fake, pb):
    worker = start_fake("--fake_step_ms", "0.2", "--drain_seconds", "1")
    options = pb.LogprobOptions(kinds=[pb.LOGPROB_KIND_RAW, pb.LOGPROB_KIND_TEMPERATURE], top_k=64)
    call = worker.stub.Generate(request(pb, logprobs=options))
    next(call)
    worker.terminate()
    assert worker.wait(timeout=20) == 0


def test_a_step_that_never_ends_ends_the_process(start_fake, pb):
    worker = start_fake("--fake_stuck_seconds", "1")
    call = worker.stub.Generate(request(pb))
    assert worker.wait() == 1
    assert "a step does not end" in worker.log()
    with fails_with(grpc.StatusCode.UNAVAILABLE):
        list(call)


def test_a_step_that_never_ends_ends_a_drain(start_fake, pb):
    worker = start_fake("--fake_step_ms", "10", "--fake_stuck_seconds", "5", "--drain_seconds", "600")
    call = worker.stub.Generate(request(pb))
    result = Result()
    started(call, result)
    worker.terminate()
    assert worker.wait() == 1
    assert "draining" in worker.log() and "a step does not end" in worker.log()
    with fails_with(grpc.StatusCode.UNAVAILABLE):
        finish(call, result)


def test_a_device_that_fails_in_a_drain_is_an_exit_status(start_fake, pb):
    worker = start_fake("--fake_step_ms", "10", "--fake_failed_seconds", "5", "--drain_seconds", "6")
    call = worker.stub.Generate(request(pb))
    started(call, Result())
    worker.terminate()
    assert worker.wait() == 1
    assert "draining" in worker.log() and "the device failed" in worker.log()


def test_idle_worker_stops_at_once(start_fake):
    worker = start_fake()
    begin = time.monotonic()
    worker.process.send_signal(signal.SIGINT)
    assert worker.wait() == 0
    assert time.monotonic() - begin < 5


def test_second_signal_ends_at_once(start_fake, pb):
    worker = start_fake("--fake_step_ms", "50")
    call = worker.stub.Generate(request(pb))
    result = Result()
    started(call, result)
    worker.terminate()
    wait_for(lambda: "draining" in worker.log())
    begin = time.monotonic()
    worker.terminate()
    assert worker.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 2


def test_many_clients_at_once(start_fake, pb):
    """256 streams over 16 connections, more than run at once; every one is complete and right."""
    worker = start_fake("--fake_step_ms", "1")
    want = {i: collect(worker.stub.Generate(request(pb, max_tokens=30, first_sample_index=i))).samples[i].tokens for i in range(4)}
    failures = []

    def client():
        with grpc.insecure_channel(worker.data, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = type(worker.stub)(channel)
            calls = [(i % 4, stub.Generate(request(pb, max_tokens=30, first_sample_index=i % 4))) for i in range(16)]
            failures.extend(i for i, call in calls if collect(call).samples[i].tokens != want[i])

    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    wait_for(lambda: worker.stub.GetLoad(pb.GetLoadRequest()).running_requests == 0)
    assert worker.stub.GetLoad(pb.GetLoadRequest()).buffered_bytes == 0


@pytest.fixture(params=["fake-worker-server", "lockstep-worker"])
def run_program(request, build_dir):
    def run(*arguments):
        return subprocess.run([build_dir / "bin" / request.param, *arguments], capture_output=True, text=True, timeout=60)

    return run


FLAGS = """model backend numerics listen control_listen token_file control_token_file tls_cert tls_key threads cuda_device cuda_graphs shared_prefix_attention weights_receive nccl_library
memory_fraction memory_gb page_size max_batch_tokens mixed_batch_tokens max_sequences
max_waiting_sequences max_prompt_tokens max_n max_request_bytes max_buffered_mb max_retained_mb reattach_seconds
max_version_wait_seconds step_timeout_seconds drain_seconds help version""".split()


@pytest.mark.parametrize("spelling", ["--help", "-help"])
def test_help_is_complete(run_program, repo_root, spelling):
    done = run_program(spelling)
    assert done.returncode == 0
    shown = [line.split()[0].removeprefix("--") for line in done.stdout.splitlines() if line.startswith("  --")]
    assert [f for f in FLAGS if f not in shown] == []
    source = (repo_root / "rollout" / "server" / "flags.cc").read_text()
    assert source.count("ABSL_FLAG(") == len(FLAGS) - 2, "a flag is missing from this test's list"
    assert "default: 127.0.0.1:50051" in done.stdout and "Example" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_version(run_program):
    done = run_program("--version")
    assert done.returncode == 0 and done.stdout.startswith("lockstep-worker ")


BAD_FLAGS = [
    ([], "--model"),
    (["--model", "x", "--no_such_flag", "1"], "no_such_flag"),
    (["--model", "x", "--listen", "nonsense"], "--listen"),
    (["--model", "x", "--listen", "127.0.0.1:99999"], "--listen"),
    (["--model", "x", "--control_listen", ":"], "--control_listen"),
    (["--model", "x", "--threads", "many"], "threads"),
    (["--model", "x", "--max_prompt_tokens", "-1"], "--max_prompt_tokens"),
    (["--model", "x", "--max_n", "0"], "--max_n"),
    (["--model", "x", "--max_request_bytes", "1"], "--max_request_bytes"),
    (["--model", "x", "--max_buffered_mb", "0"], "--max_buffered_mb"),
    (["--model", "x", "--max_retained_mb", "-1"], "--max_retained_mb"),
    (["--model", "x", "--reattach_seconds", "-1"], "--reattach_seconds"),
    (["--model", "x", "--max_version_wait_seconds", "inf"], "--max_version_wait_seconds"),
    (["--model", "x", "--drain_seconds", "-1"], "--drain_seconds"),
    (["--model", "x", "--step_timeout_seconds", "nan"], "--step_timeout_seconds"),
    (["--model", "x", "stray"], "stray"),
]


@pytest.mark.parametrize("arguments,named", BAD_FLAGS, ids=[f"{n.lstrip('-')}-{i}" for i, (_, n) in enumerate(BAD_FLAGS)])
def test_bad_flags(run_program, arguments, named):
    done = run_program(*arguments)
    assert done.returncode == 1
    assert named in done.stderr and done.stdout == ""


BAD_ENGINE_FLAGS = [
    (["--backend", "tpu"], "--backend"),
    (["--threads", "-1"], "--threads"),
    (["--memory_gb", "-1"], "--memory_gb"),
    (["--memory_gb", "nan"], "--memory_gb"),
    (["--page_size", "65"], "--page_size"),
    (["--max_batch_tokens", "-1"], "--max_batch_tokens"),
    (["--max_batch_tokens", "15", "--max_sequences", "16"], "--max_batch_tokens: value 15 is below --max_sequences, 16"),
    (["--max_sequences", "-1"], "--max_sequences"),
    (["--memory_fraction", "1.5"], "--memory_fraction"),
    (["--max_waiting_sequences", "0"], "--max_waiting_sequences"),
    (["--backend", "cuda"], "no CUDA backend"),
    (["--model", "/no/such/dir"], "/no/such/dir"),
    (["--numerics", "other"], "other"),
]


@pytest.mark.parametrize(
    "arguments,named", BAD_ENGINE_FLAGS, ids=[f"{a[0].lstrip('-')}-{i}" for i, (a, _) in enumerate(BAD_ENGINE_FLAGS)]
)
def test_worker_bad_flags(build_dir, tiny_model, arguments, named):
    """What only the real worker checks: engine flags and the checkpoint."""
    command = [build_dir / "bin" / "lockstep-worker", "--model", tiny_model, *LOOPBACK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert named in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments,sequences,tokens",
    [([], 64, 512), (["--max_batch_tokens", "16"], 16, 16), (["--max_sequences", "600"], 600, 600)],
)
def test_a_step_has_a_token_for_each_sequence(start_worker, tiny_model, pb, arguments, sequences, tokens):
    worker = start_worker(tiny_model, *arguments)
    assert worker.stub.GetLoad(pb.GetLoadRequest()).state_slots_total == sequences
    assert f"steps: up to {sequences} sequences at once, {tokens} tokens" in worker.log()


def test_info_tells_the_numerics(start_worker, tiny_model, pb):
    worker = start_worker(tiny_model, "--numerics", "hf-autocast-masked")
    numerics = worker.stub.GetInfo(pb.GetInfoRequest()).numerics
    assert numerics.profile == "hf-autocast-masked" and "torch 2.11.0" in numerics.verified_against
    for name in ("residual", "embedding", "norm_weights", "a_log"):
        assert getattr(numerics, f"{name}_dtype") == "float32", name
    assert (numerics.weights_dtype, numerics.activations_dtype) == ("bfloat16", "bfloat16")
    assert (numerics.gated_norm_casts, numerics.conv_casts) == ("two", "two")
    assert numerics.attention_program == "tiles128_forward"
    assert numerics.sliding_attention_program == "tiles128_forward_mask"


def test_port_in_use(start_fake, run_program, tiny_model):
    worker = start_fake()
    done = run_program("--model", tiny_model, "--listen", worker.data, "--control_listen", "127.0.0.1:0")
    assert done.returncode == 1 and "--listen" in done.stderr and worker.data in done.stderr
    done = run_program("--model", tiny_model, "--listen", "127.0.0.1:0", "--control_listen", worker.data)
    assert done.returncode == 1 and "--control_listen" in done.stderr


def test_worker_drains(start_worker, tiny_model, pb):
    worker = start_worker(tiny_model)
    call = worker.stub.Generate(request(pb, max_tokens=100))
    result = Result()
    started(call, result)
    worker.terminate()
    finish(call, result)
    assert len(result.samples[0].tokens) == 100
    assert worker.wait() == 0
