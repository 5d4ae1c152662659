"""Two ranks of NCCL on one GPU.

NCCL refuses a second rank on a GPU of the same host. Told by NCCL_HOSTID that the ranks' processes are on two hosts, it
joins them by its sockets, here on loopback: NCCL's own communicators, broadcasts and aborts, at a rate that says nothing
of NVLink, between processes that take turns on the GPU.
"""

import os

NOTE = "both ranks on one GPU, joined by NCCL's sockets on loopback: rates and pauses say nothing of two GPUs"
# Of the memory that the weights leave free: the learner's tensors need some as well.
WORKER_FLAGS = ["--memory_fraction", "0.4"]


def environment(host):
    """What a rank's process needs in its environment before it loads NCCL; `host`: a name for each process."""
    sockets = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    return {"NCCL_HOSTID": host, "NCCL_MNNVL_ENABLE": "0", "NCCL_NVLS_ENABLE": "0", **sockets}


def enter(host):
    """This process, from now on."""
    os.environ.update(environment(host))
