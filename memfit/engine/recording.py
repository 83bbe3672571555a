"""What is written and shown while a run goes on: run.jsonl, a progress line, and the stop of a pilot."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memfit.engine.ranks import is_first, largest, summed
from memfit.engine.run_log import RunLog
from memfit.engine.trainer import StepCounts
from memfit.errors import RunFailed
from memfit.units import duration, gib


class Recorder(TrainerCallback):
    """Writes one `step` event an optimizer step: loss, rate of each part, tokens, seconds, memory.

    Raises RunFailed at a loss that is not finite: everything after it would be wasted.
    """

    def __init__(self, log: RunLog, counts: StepCounts, stop_after: int | None = None) -> None:
        self._log = log
        self._counts = counts
        self._stop_after = stop_after
        self._process = psutil.Process()
        self._began = self._ended = time.perf_counter()
        self._row: dict[str, Any] = {}
        self.step_seconds: list[float] = []
        self.progress = Progress()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The step's batches are loaded before this call: waiting for them shows apart, as `wait_seconds`.
        self._began = time.perf_counter()
        if _on_gpu(args):
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        on_gpu = _on_gpu(args)
        if on_gpu:
            torch.cuda.synchronize()  # the GPU runs behind: without this its work would count as waiting for batches
        waited, self._ended = self._began - self._ended, time.perf_counter()
        seconds = self._ended - self._began
        self.step_seconds.append(seconds + waited)
        optimizer = kwargs["optimizer"]
        rates = {part: group["lr"] for group in optimizer.param_groups for part in group["parts"]}
        counts = self._counts
        own = (counts.tokens, counts.padded_tokens, counts.trained_tokens)
        tokens, padded_tokens, trained_tokens = summed(own, args.device)
        # Of the fullest rank, as a forecast is.
        peak, reserved = largest(_memory(), args.device) if on_gpu else (None, None)
        self._row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "learning_rate": rates,
            "tokens": tokens,
            "padded_tokens": padded_tokens,
            "trained_tokens": trained_tokens,
            "seconds": round(seconds, 4),
            "wait_seconds": round(waited, 4),
            "peak_bytes": peak,
            "reserved_bytes": reserved,
            "rss_bytes": self._process.memory_info().rss,
        }
        counts.tokens = counts.padded_tokens = counts.trained_tokens = counts.micro_batches = 0
        if self._stop_after is not None and state.global_step >= self._stop_after:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs and self._row:
            row = self._row | {"loss": logs["loss"], "grad_norm": _number(logs.get("grad_norm"))}
            self._log.write("step", **row)
            if is_first():
                self.progress.step(row, state.max_steps)
            self._row = {}
            if not math.isfinite(row["loss"]):
                raise RunFailed(
                    f"the loss became {row['loss']} at step {row['step']}",
                    "lower schedule.learning_rate, or use bf16 or fp32 instead of fp16; earlier checkpoints are whole",
                )
        elif "eval_loss" in logs:
            self._log.write("eval", step=state.global_step, loss=logs["eval_loss"], seconds=logs.get("eval_runtime"))
            if is_first():
                self.progress.say(f"step {state.global_step}: evaluation loss {logs['eval_loss']:.4f}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log.write("save", step=state.global_step, folder=f"checkpoints/checkpoint-{state.global_step}")


class Progress:
    """A line on stderr at most every few seconds: a bar would flicker in logs, silence would worry."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._every = every_seconds
        self._last = 0.0
        self._began = time.monotonic()

    def step(self, row: dict[str, Any], total: int) -> None:
        """Tell the step, the loss, what is left in time, and the memory."""
        now = time.monotonic()
        if row["step"] not in (1, total) and now - self._last < self._every:
            return
        self._last = now
        left = (now - self._began) / row["step"] * (total - row["step"])
        ends = f"{duration(left)} left" if left else "done"
        memory = row["peak_bytes"] if row["peak_bytes"] is not None else row["rss_bytes"]
        self.say(
            f"step {row['step']}/{total}  loss {row['loss']:.4f}  {row['seconds']:.2f} s/step  "
            f"{ends}  {gib(memory)}{'' if row['peak_bytes'] is not None else ' in process'}"
        )

    def say(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)


def _on_gpu(args: TrainingArguments) -> bool:
    return torch.cuda.is_available() and not args.use_cpu


def _memory() -> tuple[int, int]:
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
