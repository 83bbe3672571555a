"""What an engine is told, through transformers' own arguments, and what accelerate must be told besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, check_cuda_p2p_ib_support
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from memfit.build.checkpointing import wrapped_layers
from memfit.build.freeze import DTYPES
from memfit.catalog.precisions import PRECISIONS, ZERO
from memfit.errors import UserError
from memfit.inputs.processes import prepare_allocator, without_peer_access
from memfit.specs.plan import Plan
from memfit.strategies import STRATEGIES

NOT_MEASURED = (
    "{} on GPUs follows the sources of torch, accelerate and DeepSpeed, and was measured on CPU ranks: no GPU has "
    "confirmed it yet; the proof before a run checks each lever on this machine"
)
NARROW = "bf16_optimizer_states"  # of DeepSpeed's section bf16
# Keys of the FSDP2 section that TrainingArguments.fsdp_config takes; the others go to accelerate's plugin by hand.
_FSDP_ARGUMENTS = (
    "version",
    "reshard_after_forward",
    "cpu_offload",
    "auto_wrap_policy",
    "state_dict_type",
    "activation_checkpointing",
)


@dataclass(frozen=True)
class Engine:
    """The engine of a plan. `config` is what it is told; `notes` what memfit had to choose otherwise than planned."""

    name: str
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def is_deepspeed(self) -> bool:
        return self.name in ZERO

    def arguments(self, plan: Plan) -> dict[str, Any]:
        """The arguments of TrainingArguments that choose and set the engine."""
        precision = PRECISIONS[str(plan.recipe.levers.precision)]
        given: dict[str, Any] = {
            "bf16": precision.autocast and precision.compute == "bfloat16",
            "fp16": precision.autocast and precision.compute == "float16",
        }
        if self.is_deepspeed:
            given |= {
                # memfit makes the optimizer of the host itself (`host_adam`); told otherwise, accelerate would replace
                # it by one that keeps fp32 moments whatever the configuration says
                # (accelerate.utils.deepspeed:map_pytorch_optim_to_deepspeed).
                "deepspeed": {**self.config, "zero_force_ds_cpu_optimizer": False},
                "bf16": precision.learning == "bfloat16",
                "fp16": precision.learning == "float16",
            }
        elif self.name == "fsdp":
            given |= {"fsdp": True, "fsdp_config": {key: self.config[key] for key in _FSDP_ARGUMENTS}}
            given |= {"bf16": self.config["param_dtype"] == "bfloat16"}
        elif self.name == "ddp":
            given |= {
                "ddp_find_unused_parameters": self.config["find_unused_parameters"],
                "ddp_bucket_cap_mb": self.config["bucket_cap_mb"],
                "ddp_broadcast_buffers": self.config["broadcast_buffers"],
                "ddp_static_graph": self.config["static_graph"],
            }
        return given

    def finish(self, accelerator: Accelerator, model: nn.Module, arguments: Any) -> None:
        """Tell accelerate what TrainingArguments have no word for."""
        if self.name == "ddp" and accelerator.ddp_handler is not None:
            accelerator.ddp_handler.gradient_as_bucket_view = self.config["gradient_as_bucket_view"]
        if self.name == "fsdp":
            self._finish_fsdp(accelerator, model, arguments)

    def _finish_fsdp(self, accelerator: Accelerator, model: nn.Module, arguments: Any) -> None:
        state = accelerator.state
        if getattr(state, "fsdp_plugin", None) is None:
            # On CPU ranks accelerate drops the plugin without a word and trains under DDP
            # (accelerate.state:AcceleratorState.__init__ lists accelerators only). To go when it takes CPU ranks.
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
        plugin = state.fsdp_plugin
        # Not among the arguments: transformers would then load empty weights on all ranks but the first by itself.
        plugin.cpu_ram_efficient_loading = self.config["cpu_ram_efficient_loading"]
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in wrapped_layers(model)})
        offloads = self.config["cpu_offload"]
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=self.config["pin_memory"]) if offloads else OffloadPolicy()
        if self.config["param_dtype"] is not None:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=DTYPES[self.config["param_dtype"]],
                reduce_dtype=DTYPES[self.config["reduce_dtype"]],
                cast_forward_inputs=True,
            )


def engine_of(plan: Plan) -> Engine:
    """The engine of a plan, its needs met. Raises UserError for a package that is not installed."""
    name = str(plan.recipe.levers.parallel)
    config = STRATEGIES[name].engine_config(plan)
    notes = _on_gpu(plan) if plan.forecast.hardware.gpu is not None else ()
    if name not in ZERO:
        return Engine(name, config, notes)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"levers.parallel: {name} needs the package deepspeed ({error})",
            "pip install 'memfit[deepspeed]', or levers.parallel: fsdp",
        ) from error
    deepspeed.init_distributed(
        dist_backend="gloo" if plan.forecast.hardware.gpu is None else "nccl", auto_mpi_discovery=False
    )
    if not config["zero_force_ds_cpu_optimizer"]:
        return Engine(name, config, notes)
    problem = cpu_adam_problem()
    if problem is None:
        nearest = "pure-bf16: DeepSpeed's CPU Adam rounds to nearest, which loses small steps; bf16-mixed keeps them"
        return Engine(name, config, (*notes, nearest) if plan.recipe.levers.precision == "pure-bf16" else notes)
    if config["bf16"][NARROW]:
        # deepspeed.runtime.base_optimizer:_configure_master_weights takes no other optimizer then.
        raise UserError(
            f"levers.precision: pure-bf16 with offload needs DeepSpeed's CPU Adam, which cannot be built: {problem}",
            "levers.precision: bf16-mixed, whose fp32 weights torch's AdamW steps on the host; or see memfit doctor",
        )
    note = f"DeepSpeed's CPU Adam cannot be built here ({problem}): torch's AdamW steps in host memory, more slowly"
    return Engine(name, {**config, "zero_force_ds_cpu_optimizer": False}, (*notes, note))


def _on_gpu(plan: Plan) -> tuple[str, ...]:
    """What must be set before CUDA and NCCL start, and what is said of engines on GPUs."""
    setting = prepare_allocator(plan.recipe.levers.allocator == "expandable")
    if setting:
        # The environment acts where CUDA starts later, this call where it has started.
        torch._C._accelerator_setAllocatorSettings(setting)
    if not check_cuda_p2p_ib_support():
        # accelerate.state:PartialState refuses such cards without these settings, also one of them alone.
        without_peer_access()
    name = str(plan.recipe.levers.parallel)
    return () if name == "none" else (NOT_MEASURED.format(name),)


def host_adam(groups: list[dict[str, Any]], values: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """DeepSpeed's CPU Adam with the values of an AdamW. Its moments are in 16 bit where the configuration says so."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    own = {name: values[name] for name in ("lr", "betas", "eps")}
    return DeepSpeedCPUAdam(groups, **own, adamw_mode=True, fp32_optimizer_states=not config["bf16"][NARROW])


def cpu_adam_problem() -> str | None:
    """Why DeepSpeed's CPU Adam is not there, or None after it was found or built."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # a compiler's complaint comes as any of several kinds
        return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
    return None
