"""A rank in a process of its own: nccl_rank.py LIBRARY NRANKS RANK ACTION, the unique id in hex on standard input.

receive   for each size on the command line, a broadcast from rank 0; prints the CRC of each; then one of its own
stop      joins, and stops for good
"""

import ctypes
import os
import pathlib
import signal
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "python"))
from lockstep._nccl import Communicator, NcclLibrary  # noqa: E402

library, nranks, rank, action, *sizes = sys.argv[1:]
unique_id = bytes.fromhex(sys.stdin.readline())
with Communicator(NcclLibrary.load(library), unique_id, int(nranks), int(rank), 60) as communicator:
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    for size in map(int, sizes):
        memory = ctypes.create_string_buffer(size)
        communicator.broadcast([(ctypes.addressof(memory), size)], 0, 0, 60)
        print(zlib.crc32(memory.raw), flush=True)
    for root in range(1, int(nranks)):
        memory = ctypes.create_string_buffer(bytes([root if root == int(rank) else 0]) * 1000, 1000)
        communicator.broadcast([(ctypes.addressof(memory), 1000)], root, 0, 60)
        assert memory.raw == bytes([root]) * 1000, memory.raw[:10]
