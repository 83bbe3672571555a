"""A training loader alone in a process: what its workers and their shared memory really take, printed as JSON.

`python -m tests.unit.loader_probe MODEL DATA WORKERS PREFETCH MICRO SLICES`; the parent samples nothing:
a thread here reads /proc while the batches are taken.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from torch.utils.data import DataLoader

from memfit.build.data import Collator, SampleDataset
from memfit.build.pixels import PixelReader
from memfit.inputs.data import load_samples
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model
from memfit.specs.recipe import Data, ImageBudget


def private_bytes(process: int) -> dict[str, int]:
    """Private memory and shared memory that is no file's of one process (/proc/PID/smaps_rollup and smaps)."""
    sizes = {"private": 0, "shared": 0}
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Private_Clean", "Private_Dirty"):
                sizes["private"] += int(rest.split()[0]) * 1024
            elif name == "Pss_Shmem":
                sizes["shared"] += int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        pass
    return sizes


class Watch(threading.Thread):
    """The most that the workers have to themselves together, and the most shared memory of all processes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = {"private": 0, "shared": 0, "one": 0}
        self.on = True

    def run(self) -> None:
        me = psutil.Process()
        while self.on:
            children = [private_bytes(child.pid) for child in me.children()]
            shared = private_bytes(me.pid)["shared"] + sum(row["shared"] for row in children)
            found = {
                "private": sum(row["private"] for row in children),
                "one": max((row["private"] for row in children), default=0),
                "shared": shared,
            }
            self.most = {name: max(size, found[name]) for name, size in self.most.items()}
            time.sleep(0.02)


def batches(loader: Any, slowly: float, started: Any = None) -> int:
    """Take every batch, with pauses in which the workers fill their queues; `started` is called once they run."""
    most, taken = 0, iter(loader)
    if started is not None:
        started()
    for batch in taken:
        most = max(most, sum(t.numel() * t.element_size() for t in batch.values() if hasattr(t, "numel")))
        time.sleep(slowly)
    return most


def main(model: str, data: str, *numbers: str) -> None:
    workers, prefetch, micro, slices = map(int, numbers)
    source = find_model(model)
    source.preprocessor.update({"scale_resolution": 448, "max_slice_nums": slices})
    encoder = Encoder(source, ImageBudget())
    loaded = load_samples(Data(train=data, eval=None), None, encoder)
    pixels = PixelReader(encoder.family, encoder.processor_settings)
    dataset = SampleDataset(loaded.train, encoder, pixels)
    collate = Collator(encoder.family, encoder.pad_id, {}, encoder.image_token_id)
    dataset[0]  # what is loaded on first use is loaded once, before the fork
    gc.collect()
    watch = Watch()
    loader = DataLoader(
        dataset, micro, collate_fn=collate, num_workers=workers, prefetch_factor=prefetch, persistent_workers=True
    )
    # Forked before a thread runs here: a lock that it held would stay locked in the child.
    largest = max(batches(loader, 0.0, watch.start), batches(loader, 0.2))
    watch.on = False
    watch.join()
    costs = [(cost.tokens, cost.patches, cost.crops) for cost in loaded.train_costs]
    print(json.dumps({**watch.most, "batch": largest, "costs": costs, "reading": loaded.reading}))


if __name__ == "__main__":
    main(*sys.argv[1:])
