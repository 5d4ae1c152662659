"""Tokens and TLS as a learner meets them."""

import asyncio
import time

import grpc
import pytest

import lockstep
from lockstep import InvalidRequest, NotAuthenticated, RolloutClient, SamplingParams, UpdateFailed, WeightPublisher, cli
from lockstep._channel import Credentials, read_token
from lockstep.hf import TransformersTrainer
from lockstep.v1 import weights_pb2, weights_pb2_grpc

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
SAMPLING = SamplingParams(seed=3, max_tokens=4, ignore_eos=True)
WRONG = "no-token-of-this-worker"


@pytest.fixture(scope="module")
def files(secrets_dir):
    return secrets_dir


@pytest.fixture(scope="module", params=["plain", "tls"])
def guarded(request, start_worker, tiny_model, files):
    """A worker that wants tokens; `tls_ca`: of its clients."""
    tls = ["--tls_cert", files.cert, "--tls_key", files.key] if request.param == "tls" else []
    flags = ["--token_file", files.token_file, "--control_token_file", files.control_token_file, *tls]
    worker = start_worker(tiny_model, "--numerics", "fp32", "--threads", "1", *flags)
    worker.tls_ca = files.cert if tls else None
    return worker


@pytest.fixture(scope="module")
def trainer(tiny_model):
    return TransformersTrainer(tiny_model, device="cpu", dtype="float32")


def soon(action, error):
    """`action` fails at once: nothing waits for or retries what cannot get better."""
    began = time.monotonic()
    with pytest.raises(error) as caught:
        action()
    assert time.monotonic() - began < 8  # retry_s is 10, connect_timeout 60
    return caught.value


def test_client(guarded, files):
    with RolloutClient(guarded.data, token=files.token, tls_ca=guarded.tls_ca) as client:
        rollouts = client.generate([[5, 6, 7]], SAMPLING, n=2)
        assert [len(t) for t in rollouts.tokens] == [4, 4]
        assert len(client.score(rollouts.sequences)) == 2
        assert list(client.info()) == list(client.load()) == [guarded.data]


def test_client_under_asyncio(guarded, files):
    async def run():
        async with lockstep.aio.RolloutClient(guarded.data, token=files.token, tls_ca=guarded.tls_ca) as client:
            rollouts = await client.generate([[5, 6, 7]], SAMPLING)
        async with lockstep.aio.RolloutClient(guarded.data, token=WRONG, tls_ca=guarded.tls_ca) as client:
            with pytest.raises(NotAuthenticated):
                await client.generate([[5, 6, 7]], SAMPLING)
        return rollouts

    assert len(asyncio.run(run()).tokens[0]) == 4


@pytest.mark.parametrize("which", ["none", "wrong", "control"])
def test_client_without_the_token(guarded, files, which):
    token = {"none": None, "wrong": WRONG, "control": files.control_token}[which]
    with RolloutClient(guarded.data, token=token, tls_ca=guarded.tls_ca) as client:
        for call in (
            lambda: client.generate([[5, 6, 7]] * 8, SAMPLING),
            lambda: client.score([[5, 6, 7]]),
            client.info,
            client.load,
        ):
            error = soon(call, NotAuthenticated)
            assert error.code == UNAUTHENTICATED and error.worker == guarded.data
            assert "--token_file" in str(error) and (token is None or token not in str(error))


# The other worker of the pair has no TLS.
@pytest.mark.parametrize("guarded", ["plain"], indirect=True)
def test_client_goes_on_with_the_workers_that_take_the_token(guarded, start_worker, tiny_model, files):
    with RolloutClient(
        [guarded.data, start_worker(tiny_model, "--threads", "1").data], token=WRONG, tls_ca=guarded.tls_ca
    ) as client:
        assert len(client.generate([[5, 6, 7]] * 8, SAMPLING)) == 8
        assert "UNAUTHENTICATED" in client._client._pool.describe()


def test_publisher(guarded, trainer, files):
    options = {"manifest_from": trainer.model, "tls_ca": guarded.tls_ca}
    for token in (None, WRONG, files.token):
        with WeightPublisher(guarded.control, token=token, **options) as publisher:
            error = soon(lambda publisher=publisher: publisher.publish((0, 1), trainer.tensors().items()), UpdateFailed)
            failed = error.report.failed[0]
            assert error.code == UNAUTHENTICATED and isinstance(failed.error, NotAuthenticated)
            assert failed.failed_in == "begin" and "--control_token_file" in str(error)
            assert token is None or token not in str(error)
            assert isinstance(publisher.status()[guarded.control], NotAuthenticated)
    with WeightPublisher(guarded.control, token=files.control_token, **options) as publisher:
        report = publisher.publish((0, 1), trainer.tensors().items())
        assert report.workers[0].version == (0, 1)
        assert publisher.digests()[guarded.control].weight_version.step == 1


def test_calls_that_are_waited_for_later(guarded, files):
    """As the publisher makes them over NCCL."""
    with Credentials(files.control_token, guarded.tls_ca).channel(guarded.control) as channel:
        stub = weights_pb2_grpc.WeightsStub(channel)
        assert stub.Leave.future(weights_pb2.LeaveRequest(group="none"), timeout=10).result().left is False
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Receive(iter([weights_pb2.ReceiveRequest()]), timeout=10))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def parity_command(guarded, tiny_model, *extra):
    command = ["parity", "--worker", guarded.data, "--model", str(tiny_model), "--prompts", "2", "--max_tokens", "4"]
    tls = ["--tls_ca", str(guarded.tls_ca)] if guarded.tls_ca else []
    return cli.main([*command, "--dtype", "float32", "--device", "cpu", *tls, *map(str, extra)])


def test_parity_command(guarded, start_worker, tiny_model, files, capsys):
    tokens = ["--token_file", files.token_file, "--control_token_file", files.control_token_file]
    control = ["--control", guarded.control]
    assert parity_command(guarded, tiny_model, *control, *tokens) == 0
    assert parity_command(guarded, tiny_model, *control, *tokens[:2]) == 2
    assert "UNAUTHENTICATED" in capsys.readouterr().err
    assert parity_command(guarded, tiny_model, *control) == 2
    assert "UNAUTHENTICATED" in capsys.readouterr().err


@pytest.mark.parametrize("guarded", ["tls"], indirect=True)
def test_another_authority(guarded, files):
    for tls_ca in (files.other_cert, None):
        with RolloutClient(guarded.data, token=files.token, tls_ca=tls_ca, connect_timeout=1) as client:
            with pytest.raises(lockstep.WorkerUnavailable):
                client.generate([[5, 6, 7]], SAMPLING)


@pytest.mark.parametrize("token", ["", "short-secret", "secret with spaces in it", "secret-line-with-its-end\n", 7])
def test_tokens_that_none_can_be(token):
    with pytest.raises(InvalidRequest) as caught:
        RolloutClient("127.0.0.1:1", token=token)
    assert "token: want 16 to 4096" in str(caught.value) and "secret" not in str(caught.value)
    with pytest.raises(InvalidRequest):
        WeightPublisher("127.0.0.1:1", manifest_from=[("a", "float32", (1,))], token=token)


def test_authorities_that_none_can_be(tmp_path, files):
    for path in (tmp_path / "none", files.key, tmp_path):
        with pytest.raises(InvalidRequest, match="tls_ca: "):
            RolloutClient("127.0.0.1:1", tls_ca=path)


def test_token_file(files):
    assert read_token(files.token_file) == files.token
