"""New weights from a DeepSpeed ZeRO-3 module. Every rank calls publish(); rank 0 sends.

Parameters are empty until gathered: their whole shape is ds_shape. GatheredParameters is a collective, so every rank
walks the iterator. tests/python/test_zero3.py runs it (DeepSpeed 0.19.8, two ranks on CPUs).
"""

from lockstep import WeightPublisher


def manifest(module):
    """(name, dtype, whole shape) of every parameter and buffer."""
    return [(n, p.dtype, getattr(p, "ds_shape", p.shape)) for n, p in module.state_dict(keep_vars=True).items()]


def gathered(module):
    import deepspeed

    for name, parameter in module.state_dict(keep_vars=True).items():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data  # copied before the next is asked for
        else:
            yield name, parameter


def make_publisher(module, workers):
    return WeightPublisher(workers, manifest_from=manifest(module))


def publish(publisher, module, step):
    import torch.distributed as dist

    return publisher.publish((0, step), gathered(module), policy="recompute", send=dist.get_rank() == 0)
