"""A batch on a cluster of several nodes on this machine, all but the first of which are killed and replaced, again and
again: tests/cluster/test_batch.py runs it as `lost_nodes.py DIR ROWS`. The last line on stdout is JSON: how many nodes
were "killed", what the run counted, how many seconds it took."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from ray.cluster_utils import Cluster
from ray_batch import sleeping_work, write_batch

from trip_rt.cluster import batch
from trip_rt.cluster.clip_maker import CLIPS, RESULTS, swept
from trip_rt.cluster.rows import pieces_of
from trip_rt.cluster.session import connected

SLEEP = 0.2  # seconds a clip
KILLS = 10
PAUSES = 2.0, 8.0  # seconds between two kills, at random


def main(folder: Path, rows: int) -> None:
    with tempfile.TemporaryDirectory(prefix="nodes-", dir="/tmp") as temporary:
        memory = 100 << 20
        head = {"num_cpus": 0, "object_store_memory": memory, "include_dashboard": False, "temp_dir": temporary}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            with connected(cluster.address):
                _run(cluster, folder, rows, memory)
        finally:
            cluster.shutdown()


def _run(cluster: Cluster, folder: Path, rows: int, memory: int) -> None:
    file = write_batch(folder, rows)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=memory) for _ in range(2)]
    killed, moments = 0, random.Random(0)
    pool = batch.Pool(1, 2, cpus=1, gpu=False)
    with batch.output_folder(folder), batch.quiet(), ThreadPoolExecutor(1) as thread:
        began = time.perf_counter()
        parts = batch.ResultParts(folder / RESULTS)
        run = thread.submit(batch.make_clips, pieces_of(file), sleeping_work(folder, SLEEP), pool, 0, parts)
        while not run.done():  # in the main thread, for Ray's nodes set signal handlers
            wait([run], moments.uniform(*PAUSES))
            if killed < KILLS and not run.done():
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
                killed += 1
                nodes.append(cluster.add_node(num_cpus=1, object_store_memory=memory))
        swept(folder / CLIPS, tries=True)  # as the command does, once nobody writes there any more
    print(json.dumps({"killed": killed, "counts": run.result(), "seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
