"""publish_fsdp2.py on two ranks (CPU, gloo): gathers on both, one sends, nobody hangs, not even when the update fails."""

import sys

import pytest
import torch
from fake_weights import FakeWeights
from two_ranks import run_two_ranks

from lockstep.publisher import manifest_of


def make_model():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Linear(33, 8), torch.nn.RMSNorm(8))


def rank_main(rank, address, init_file, paths, results):
    sys.path[:0] = paths
    import publish_fsdp2
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from lockstep import UpdateFailed

    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    model = fully_shard(make_model())
    publisher = publish_fsdp2.make_publisher(model, [address])
    report = publish_fsdp2.publish(publisher, model, 1)
    outcome = [report and [tuple(w.version) for w in report.workers]]
    try:  # a version that is over: refused at Begin, while rank 1 is gathering
        publisher.publish((0, 0), publish_fsdp2.gathered(model), send=rank == 0)
        outcome.append("walked")
    except UpdateFailed as error:
        outcome.append(error.report.failed[0].failed_in)
    results.put((rank, outcome))
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_ranks(repo_root, tmp_path):
    model = make_model()
    worker = FakeWeights(manifest_of(model)).start()
    outcome = dict(run_two_ranks(rank_main, worker, repo_root, tmp_path, timeout=90))
    assert outcome == {0: [[(0, 1)], "begin"], 1: [None, "walked"]}
    for name, tensor in model.state_dict().items():
        assert worker.weights[name].tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    worker.server.stop(None)
