"""Two ranks of a learner, each a process of its own."""

import torch


def run_two_ranks(rank_main, worker, repo_root, tmp_path, timeout):
    """What rank_main(rank, the worker's address, a file to meet at, paths, results) puts into `results`, of both ranks."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    paths = [str(repo_root / p) for p in ("python", "python/examples", "tests/python")]
    arguments = (worker.address, str(tmp_path / "init"), paths, results)
    ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        return [results.get(timeout=timeout) for _ in ranks]
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
