"""Tokens and TLS: what a port refuses, what it does not, and what the command line says about bad files."""

import collections
import subprocess

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from streams import collect, fails_with

Code = grpc.StatusCode
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
HEALTH = "grpc.health.v1.Health"
ROLLOUT = {"Generate", "Score", "Abort", "GetInfo", "GetLoad"}
WEIGHTS = {"Begin", "Push", "Join", "Receive", "Leave", "Verify", "Commit", "Rollback", "GetStatus", "GetDigests"}
CONTROL = {"Pause", "Resume", "Drain"}

Method = collections.namedtuple("Method", "service name streams_in streams_out")


def metadata(token):
    return (("authorization", f"Bearer {token}"),) if token else ()


def token_flags(secrets):
    return ["--token_file", secrets.token_file, "--control_token_file", secrets.control_token_file]


@pytest.fixture(scope="module")
def guarded(start_worker, tiny_model, secrets_dir):
    return start_worker(tiny_model, *token_flags(secrets_dir))


@pytest.fixture(scope="module")
def ports(guarded, secrets_dir):
    """(channel, token, the other port's token) of both."""
    with grpc.insecure_channel(guarded.data) as data, grpc.insecure_channel(guarded.control) as control:
        yield {
            "data": (data, secrets_dir.token, secrets_dir.control_token),
            "control": (control, secrets_dir.control_token, secrets_dir.token),
        }


def reflect(channel, token, request):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    return next(iter(stub.ServerReflectionInfo(iter([request]), metadata=metadata(token), timeout=10)))


def methods_of(channel, token):
    """Every method of every service that a port has, by its own word."""
    request = reflection_pb2.ServerReflectionRequest
    services = reflect(channel, token, request(list_services="")).list_services_response.service
    found = []
    assert HEALTH in [s.name for s in services]
    for service in (s.name for s in services if s.name != HEALTH):  # of which gRPC has no descriptor
        answer = reflect(channel, token, request(file_containing_symbol=service))
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            for described in (d for d in file.service if f"{file.package}.{d.name}" == service):
                found += [Method(service, m.name, m.client_streaming, m.server_streaming) for m in described.method]
    return found


def call(channel, method, token, extra=()):
    """The status of a call with one empty message."""
    kind = f"{'stream' if method.streams_in else 'unary'}_{'stream' if method.streams_out else 'unary'}"
    send = getattr(channel, kind)(f"/{method.service}/{method.name}")
    options = {"metadata": (*metadata(token), *extra), "timeout": 20}
    try:
        answer = send(iter([b""]) if method.streams_in else b"", **options)
        if method.streams_out:
            if method.name == "Watch":  # does not end by itself
                next(answer)
                answer.cancel()
            else:
                list(answer)
        return Code.OK, ""
    except grpc.RpcError as error:
        return error.code(), error.details()


def test_reflection_lists_what_is_tested(ports):
    names = {}
    for port, (channel, token, _) in ports.items():
        names[port] = collections.defaultdict(set)
        for method in methods_of(channel, token):
            names[port][method.service].add(method.name)
    common = {REFLECTION: {"ServerReflectionInfo"}}
    assert names["data"] == {**common, "lockstep.v1.Rollout": ROLLOUT}
    want = {**common, "lockstep.v1.Weights": WEIGHTS, "lockstep.v1.Control": CONTROL}
    assert names["control"] == want


@pytest.mark.parametrize("port,flag", [("data", "--token_file"), ("control", "--control_token_file")])
def test_every_method_wants_the_token(ports, port, flag):
    channel, token, other = ports[port]
    methods = sorted(methods_of(channel, token), key=lambda m: m.name == "Drain")
    wrong = [None, other, token[:-1], token + "x", token.swapcase(), "x" * len(token), "x" * 5000]
    for method in methods:
        for given in wrong:
            code, details = call(channel, method, given)
            assert code == Code.UNAUTHENTICATED, (method, given, code, details)
            assert "authorization: Bearer TOKEN" in details and details.endswith(flag), details
            assert "missing" in details if given is None else "not this port's token" in details
            assert token not in details and (not given or given not in details)
        twice = call(channel, method, token, extra=metadata(token))
        assert twice[0] == Code.UNAUTHENTICATED and "more than once" in twice[1], (method, twice)
        for scheme in (token, f"bearer {token}", f"Basic {token}", f"Bearer  {token}", ""):
            assert call(channel, method, None, extra=[("authorization", scheme)])[0] == Code.UNAUTHENTICATED, method


def test_refused_calls_do_nothing(guarded, ports, secrets_dir, stubs, pb):
    """After all of them, Drain, Pause and Commit included."""
    channel, token, _ = ports["control"]
    for method in methods_of(channel, token):
        assert call(channel, method, None)[0] == Code.UNAUTHENTICATED
    channel, token, _ = ports["data"]
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="lockstep.v1.Rollout"))
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    request = pb.GenerateRequest(
        prompt_token_ids=[5, 6, 7], sampling=pb.SamplingParams(seed=7, max_tokens=5, ignore_eos=True)
    )
    stub = stubs.grpc.RolloutStub(channel)
    result = collect(stub.Generate(request, metadata=metadata(token), timeout=30))
    assert len(result.samples[0].tokens) == 5
    with fails_with(Code.UNAUTHENTICATED):
        list(stub.Generate(request))
    assert stub.GetLoad(pb.GetLoadRequest(), metadata=metadata(token)).running_requests == 0


def test_health_is_open(ports):
    for channel, _, _ in ports.values():
        for name, streams in (("Check", False), ("Watch", True)):
            assert call(channel, Method(HEALTH, name, False, streams), None) == (Code.OK, "")


def test_refused_reflection_says_nothing(ports):
    """Its handler is gRPC's, and runs; nothing of what it answers may come through."""
    channel, _, other = ports["data"]
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    for i in range(100):
        answers = stub.ServerReflectionInfo(iter([request] * 3), metadata=metadata(other if i % 2 else None), timeout=10)
        with fails_with(Code.UNAUTHENTICATED):
            assert next(answers) is None


def test_a_port_without_a_token_asks_for_none(start_fake, secrets_dir, stubs, pb):
    for flags, data, control in (
        (["--token_file", secrets_dir.token_file], Code.UNAUTHENTICATED, Code.OK),
        (["--control_token_file", secrets_dir.control_token_file], Code.OK, Code.UNAUTHENTICATED),
    ):
        worker = start_fake(*flags)
        assert call(worker.channel, Method("lockstep.v1.Rollout", "GetInfo", False, False), None)[0] == data
        assert call(worker.channel, Method(REFLECTION, "ServerReflectionInfo", True, True), None)[0] == data
        with grpc.insecure_channel(worker.control) as channel:
            assert call(channel, Method(REFLECTION, "ServerReflectionInfo", True, True), None)[0] == control


def test_fake_worker_wants_the_token(start_fake, secrets_dir):
    worker = start_fake(*token_flags(secrets_dir))
    for method in methods_of(worker.channel, secrets_dir.token):
        assert call(worker.channel, method, None)[0] == Code.UNAUTHENTICATED
        assert call(worker.channel, method, secrets_dir.token)[0] != Code.UNAUTHENTICATED


def test_every_method_takes_the_token(start_worker, tiny_model, secrets_dir):
    """A worker of its own, for it is drained in the end."""
    worker = start_worker(tiny_model, *token_flags(secrets_dir))
    for address, token in ((worker.data, secrets_dir.token), (worker.control, secrets_dir.control_token)):
        with grpc.insecure_channel(address) as channel:
            methods = methods_of(channel, token)
            assert len([m for m in methods if m.service.startswith("lockstep.")]) in (len(ROLLOUT), len(WEIGHTS | CONTROL))
            for method in sorted(methods, key=lambda m: m.name == "Drain"):
                code, details = call(channel, method, token)
                assert code in (Code.OK, Code.INVALID_ARGUMENT), (method, code, details)
    worker.terminate()
    assert worker.wait() == 0
    for secret in (secrets_dir.token, secrets_dir.control_token):
        assert secret not in worker.log()


def tls_channel(address, cert):
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(cert.read_bytes()))


def test_tls(start_fake, secrets_dir):
    worker = start_fake("--tls_cert", secrets_dir.cert, "--tls_key", secrets_dir.key, *token_flags(secrets_dir))
    info = Method("lockstep.v1.Rollout", "GetInfo", False, False)
    with tls_channel(worker.data, secrets_dir.cert) as channel:
        assert call(channel, info, secrets_dir.token)[0] == Code.OK
        assert call(channel, info, None)[0] == Code.UNAUTHENTICATED
        assert call(channel, Method(REFLECTION, "ServerReflectionInfo", True, True), None)[0] == Code.UNAUTHENTICATED
    with tls_channel(worker.control, secrets_dir.cert) as channel:
        assert methods_of(channel, secrets_dir.control_token)
    with tls_channel(worker.data, secrets_dir.other_cert) as channel:
        assert call(channel, info, secrets_dir.token)[0] == Code.UNAVAILABLE
    for address in (worker.data, worker.control):
        with grpc.insecure_channel(address) as channel:
            assert call(channel, Method(HEALTH, "Check", False, False), None)[0] == Code.UNAVAILABLE


def test_warnings(start_fake, secrets_dir):
    """Beyond loopback a worker says what is missing, and no more."""
    tls = ["--tls_cert", secrets_dir.cert, "--tls_key", secrets_dir.key]
    beyond = ["--listen", "0.0.0.0:0", "--control_listen", "0.0.0.0:0"]
    for flags, want in (
        ([], "without authentication or encryption"),
        (tls, "without authentication:"),
        (token_flags(secrets_dir), "without encryption"),
        ([*tls, *token_flags(secrets_dir)], None),
    ):
        log = start_fake(*beyond, *flags).log()
        assert log.count("listening on") == (2 if want else 0) and log.count(want or "without") == (2 if want else 0), log
        assert "without" not in start_fake(*flags).log()


@pytest.fixture
def start_up_error(build_dir):
    def run(*arguments):
        command = [build_dir / "bin" / "fake-worker-server", "--model", "x", *arguments]
        command += ["--listen", "127.0.0.1:0", "--control_listen", "127.0.0.1:0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stdout == ""
        return done.stderr.splitlines()[-1]

    return run


@pytest.mark.parametrize("flag", ["--token_file", "--control_token_file"])
@pytest.mark.parametrize(
    "content,seen",
    [
        (b"", "has 0 characters"),
        (b"\nsecret-in-the-second-line\n", "has 0 characters"),
        (b"secret-15-chars", "has 15 characters"),
        (b"secret" * 1000, "has more than 4096 characters"),
        (b"secret-with-a-space here", "character 20"),
        (b"secret-of-another-system\r\n", "character 25"),
        ("secret-with-an-umlaut-\u00fc\n".encode(), "character 23"),
        (b"secret-with-a-zero\0-byte\n", "character 19"),
    ],
    ids=["empty", "empty-line", "short", "long", "space", "crlf", "umlaut", "zero"],
)
def test_bad_tokens(start_up_error, tmp_path, flag, content, seen):
    path = tmp_path / "file"
    path.touch(mode=0o600)
    path.write_bytes(content)
    error = start_up_error(flag, path)
    assert f"{flag}: " in error and seen in error and "want 16 to 4096 printable" in error
    assert "secret" not in error


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_token_file_that_others_may_access(start_up_error, tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("0123456789abcdef")
    path.chmod(mode)
    error = start_up_error("--token_file", path)
    assert "--token_file: " in error and f"mode {mode:03o}" in error and "chmod 600" in error
    assert "0123456789abcdef" not in error


def test_longest_and_shortest_token(start_fake, tmp_path):
    for length in (16, 4096):
        path = tmp_path / str(length)
        path.touch(mode=0o600)
        path.write_text("~" * length)  # no newline at the end
        worker = start_fake("--token_file", path)
        assert call(worker.channel, Method("lockstep.v1.Rollout", "GetInfo", False, False), "~" * length)[0] == Code.OK


def test_files_that_are_not_there(start_up_error, tmp_path):
    for flag in ("--token_file", "--control_token_file"):
        assert f"{flag}: cannot open" in start_up_error(flag, tmp_path / "none")
        assert f"{flag}: " in start_up_error(flag, tmp_path)


def test_bad_tls_files(start_up_error, tmp_path, secrets_dir):
    assert "--tls_key: not given" in start_up_error("--tls_cert", secrets_dir.cert)
    assert "--tls_cert: not given" in start_up_error("--tls_key", secrets_dir.key)
    assert "--tls_cert: cannot open" in start_up_error("--tls_cert", tmp_path / "none", "--tls_key", secrets_dir.key)
    assert "--tls_key: cannot open" in start_up_error("--tls_cert", secrets_dir.cert, "--tls_key", tmp_path / "none")
    empty = tmp_path / "empty"
    empty.touch()
    assert '--tls_cert: no "-----BEGIN "' in start_up_error("--tls_cert", empty, "--tls_key", secrets_dir.key)
    error = start_up_error("--tls_cert", secrets_dir.cert, "--tls_key", secrets_dir.other_key)
    assert "--tls_cert and --tls_key that belong together" in error
