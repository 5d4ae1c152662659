"""publish_zero3.py under DeepSpeed ZeRO-3 on two ranks (CPU, gloo): after a training step, what arrives are the whole
parameters; nobody hangs, not even when the update fails.

Skipped where DeepSpeed is not installed: it is built from source, and compiles an extension when it first runs.
"""

import os
import sys

import pytest
import torch
from fake_weights import FakeWeights
from two_ranks import run_two_ranks

from lockstep.publisher import manifest_of

pytest.importorskip("deepspeed", reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed")

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
}


def make_model():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Linear(33, 8), torch.nn.RMSNorm(8))


def rank_main(rank, address, init_file, paths, results):
    sys.path[:0] = paths
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    import deepspeed
    import publish_zero3

    from lockstep import UpdateFailed

    deepspeed.init_distributed(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=2, auto_mpi_discovery=False
    )
    model = make_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    assert model[0].weight.numel() < 16 * 33, "the parameters are not partitioned"
    torch.manual_seed(rank)
    engine.backward(engine(torch.randn(4, 16)).square().mean())
    engine.step()

    publisher = publish_zero3.make_publisher(model, [address])
    report = publish_zero3.publish(publisher, model, 1)
    outcome = [report and [tuple(w.version) for w in report.workers]]
    try:  # a version that is over: refused at Begin, while rank 1 is gathering
        publisher.publish((0, 0), publish_zero3.gathered(model), send=rank == 0)
        outcome.append("walked")
    except UpdateFailed as error:
        outcome.append(error.report.failed[0].failed_in)
    whole = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.data.clone().numpy()
    results.put((rank, outcome, whole))
    results.close()
    results.join_thread()
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(600)  # with that
def test_two_ranks(repo_root, tmp_path):
    model = make_model()
    worker = FakeWeights(manifest_of(model)).start()
    found = {rank: rest for rank, *rest in run_two_ranks(rank_main, worker, repo_root, tmp_path, timeout=500)}
    assert {rank: outcome for rank, (outcome, _) in found.items()} == {0: [[(0, 1)], "begin"], 1: [None, "walked"]}
    before = dict(model.named_parameters())
    for name, trained in found[0][1].items():
        assert worker.weights[name].tobytes() == trained.tobytes() == found[1][1][name].tobytes()
        assert trained.tobytes() != before[name].detach().numpy().tobytes(), f"{name} was not trained"
    worker.server.stop(None)
