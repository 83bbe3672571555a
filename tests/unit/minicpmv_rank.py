"""One rank of a tiny MiniCPM-V training run: `python -m tests.unit.minicpmv_rank ENGINE MODEL_FOLDER OUT`.

Rank and world size come from the environment. ENGINE: one (a single process takes all samples), fsdp or zero3. Samples
differ between ranks as much as they can: pictures with many crops, with one, and none at all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from PIL import Image

from memfit import models

# For every step and rank: sizes of the sample's pictures.
STEPS: tuple[tuple[tuple[tuple[int, int], ...], ...], ...] = (
    (((300, 260),), ()),
    ((), ((90, 70), (400, 100))),
    ((), ()),
    (((120, 500), (60, 60)), ((64, 64),)),
)


def sample(processor: Any, step: int, rank: int) -> dict[str, Any]:
    sizes = STEPS[step][rank]
    words = "".join("(<image>./</image>)\n" for _ in sizes) + f"step {step} of rank {rank}" * (1 + rank)
    shown = [Image.new("RGB", size, (50 * step, 200 - 90 * rank, 30)) for size in sizes]
    given = dict(processor(words, shown))
    given.pop("attention_mask")
    return given | {"labels": given["input_ids"].clone()}


def step_loss(model: Any, given: dict[str, Any], tokens: int) -> torch.Tensor:
    """The sum over this sample's tokens, divided by all tokens of the step."""
    labels = given.pop("labels")
    logits = model(**given).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / tokens


def sharded(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ in ("SiglipEncoderLayer", "Qwen2DecoderLayer", "Resampler"):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(engine: str, folder: str) -> list[float]:
    models.register()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    batches = [[sample(processor, step, r) for r in range(2)] for step in range(len(STEPS))]
    tokens = [sum(given["labels"].shape[1] - 1 for given in batch) for batch in batches]
    if engine == "zero3":
        return train_zero3(folder, [batch[rank] for batch in batches], tokens)
    model = transformers.AutoModel.from_pretrained(folder).train()
    if engine == "fsdp":
        dist.init_process_group("gloo")
        model = sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch, count in zip(batches, tokens, strict=True):
        own = batch if ranks == 1 else [batch[rank]]
        total = 0.0
        for given in own:
            loss = step_loss(model, given, count)
            (loss * ranks).backward()  # FSDP2 averages gradients over ranks
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(summed(total))
    model.eval()
    for given in batches[0] if ranks == 1 else [batches[0][rank]]:  # unequal in evaluation too: nobody hangs
        with torch.no_grad():
            model(**{name: value for name, value in given.items() if name != "labels"})
    return losses


def train_zero3(folder: str, batches: list[dict[str, Any]], tokens: list[int]) -> list[float]:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01, "torch_adam": True}},
        # Parameters below the threshold are not split; of a tiny model that would be all.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    deepspeed.init_distributed(dist_backend="gloo")
    keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained splits what it makes
    model = transformers.AutoModel.from_pretrained(folder)
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    del keep
    losses = []
    for given, count in zip(batches, tokens, strict=True):
        engine.train()
        evaluated = dict(given)
        loss = step_loss(engine, given, count)
        engine.backward(loss * dist.get_world_size())
        engine.step()
        losses.append(summed(loss.item()))
        engine.eval()
        with torch.no_grad():
            engine(**{name: value for name, value in evaluated.items() if name != "labels"})
    return losses


def summed(value: float) -> float:
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    losses = train(sys.argv[1], sys.argv[2])
    if int(os.environ.get("RANK", "0")) == 0:
        Path(sys.argv[3]).write_text(json.dumps(losses))
    if dist.is_initialized():
        dist.destroy_process_group()
