"""The machine's read bandwidth: threads scanning memory far larger than the caches."""

import ctypes
import threading
import time

import numpy as np


def read_bandwidth(threads, bytes_per_thread=1 << 28, seconds=1.5):
    """Bytes per second that `threads` threads read together: the best pass of many over the same buffers.

    memchr looks for a byte that is not there: a vectorised loop of loads and nothing else. ctypes lets the threads run
    at once.
    """
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    memchr.restype = ctypes.c_void_p
    buffers = [np.ones(bytes_per_thread, dtype=np.uint8) for _ in range(threads)]
    start = threading.Barrier(threads)
    best = [0.0]
    passes = max(3, int(seconds * 10e9 / bytes_per_thread))

    def scan(index):
        address, size = buffers[index].ctypes.data, buffers[index].nbytes
        for _ in range(passes):
            start.wait()
            begin = time.perf_counter()
            if memchr(address, 0, size) is not None:
                raise AssertionError("memchr found a byte that is not there")
            start.wait()
            if index == 0:
                best[0] = max(best[0], threads * size / (time.perf_counter() - begin))

    workers = [threading.Thread(target=scan, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return best[0]
