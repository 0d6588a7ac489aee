"""One rank of a process group that test_distributed.py starts: runs every case and writes down what failed."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import distributed_adapters_dino  # noqa: F401  (registers its cases, as the others do)
import distributed_adapters_lightly  # noqa: F401
import distributed_adapters_open_clip  # noqa: F401
import distributed_adapters_pml  # noqa: F401
import distributed_adapters_sentence_transformers  # noqa: F401
import distributed_adapters_solo  # noqa: F401
import distributed_clustering  # noqa: F401
import distributed_decorrelation  # noqa: F401
import distributed_koleo  # noqa: F401
import distributed_losses  # noqa: F401
import distributed_moments  # noqa: F401
import distributed_msn  # noqa: F401
import distributed_prototype_features  # noqa: F401
import distributed_prototypes  # noqa: F401
import distributed_training  # noqa: F401
from benchmarks import Unavailable
from distributed_common import CASES
from distributed_contract import one_rank_away

TIMEOUT = timedelta(seconds=60)


def main(rank: int, world: int, meeting: str, results: str, what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=TIMEOUT)
    report: dict[str, object] = {}
    if what == "one_rank_away":
        one_rank_away(rank, world, report)
        Path(results).write_text(json.dumps(report))
        os._exit(0)  # the group is broken and cannot be taken down in order
    for name, function in CASES.items():
        start, failure, skipped = time.monotonic(), None, None
        try:
            function(rank, world)
        except Unavailable as reason:
            skipped = str(reason)
        except Exception:
            failure = traceback.format_exc()
        report[name] = {"seconds": time.monotonic() - start, "failure": failure, "skipped": skipped}
        Path(results).write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
