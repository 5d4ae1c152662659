"""New weights from an FSDP2 model (torch.distributed.fsdp.fully_shard). Every rank calls publish(); rank 0 sends.

The manifest is made once, of the global shapes (a DTensor's own shape). full_tensor() gathers, so every rank walks the
iterator; one parameter at a time is whole.
"""

from lockstep import WeightPublisher


def gathered(model):
    """(name, whole tensor) of every parameter and buffer; a collective on every rank."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def make_publisher(model, workers):
    return WeightPublisher(workers, manifest_from=model)


def publish(publisher, model, step):
    import torch.distributed as dist

    sends = dist.get_rank() == 0
    report = publisher.publish((0, step), gathered(model), policy="recompute", send=sends)
    dist.barrier()  # no rank asks for rollouts of the new version before it serves
    return report
