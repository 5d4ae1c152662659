"""Lockstep: rollouts whose log-probabilities are the trainer's own.

RolloutClient, aio.RolloutClient    generate and score over any number of workers
WeightPublisher                     new weights into running workers
lockstep.parity, `lockstep parity`  worker against trainer, token by token
lockstep.trainer                    what the trainer must set; log-probabilities for a loss
"""

from . import _stubs

__path__ += _stubs.package_path()

from .digest import digest  # noqa: E402

__all__ = ["digest"]
__version__ = "0.1.0"
