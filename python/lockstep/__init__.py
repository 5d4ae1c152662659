"""Lockstep: rollouts whose log-probabilities are the trainer's own.

RolloutClient, aio.RolloutClient    generate and score over any number of workers
WeightPublisher                     new weights into running workers
lockstep.parity, `lockstep parity`  worker against trainer, token by token
lockstep.trainer                    what the trainer must set; log-probabilities for a loss
"""

from . import _stubs

__path__ += _stubs.package_path()

from . import aio  # noqa: E402
from ._digest import digest  # noqa: E402
from .client import RolloutClient  # noqa: E402
from .errors import (  # noqa: E402
    DeadlineExceeded,
    InvalidRequest,
    LockstepError,
    NcclError,
    NotAuthenticated,
    NotSupported,
    Overloaded,
    RollbackFailed,
    UpdateFailed,
    WorkerDefect,
    WorkerUnavailable,
)
from .publisher import PublishReport, WeightPublisher  # noqa: E402
from .rollouts import Padded, Rollouts, Sample, Version, VersionSpan  # noqa: E402
from .sampling import SamplingParams  # noqa: E402

__all__ = [
    "DeadlineExceeded",
    "InvalidRequest",
    "LockstepError",
    "NcclError",
    "NotAuthenticated",
    "NotSupported",
    "Overloaded",
    "Padded",
    "PublishReport",
    "RollbackFailed",
    "RolloutClient",
    "Rollouts",
    "Sample",
    "SamplingParams",
    "UpdateFailed",
    "Version",
    "VersionSpan",
    "WeightPublisher",
    "WorkerDefect",
    "WorkerUnavailable",
    "aio",
    "digest",
]
__version__ = "0.1.0"
