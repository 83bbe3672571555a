"""Which device a run uses, and what torch can do with the GPUs of this machine."""

from __future__ import annotations

import torch
from torch import distributed, nn

from memfit.errors import UserError
from memfit.inputs import machine
from memfit.inputs.processes import rank_facts
from memfit.specs.hardware import Hardware
from memfit.specs.recipe import Recipe


def torch_facts() -> machine.TorchFacts:
    """What this build of torch says of itself; asked once before training."""
    problem = None
    available = torch.cuda.is_available()
    if not available and torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as error:  # the text of the driver is what the user needs
            problem = str(error).strip().splitlines()[0]
    return machine.TorchFacts(
        version=torch.__version__,
        cuda_version=torch.version.cuda,
        arch_list=tuple(torch.cuda.get_arch_list()) if available else (),
        is_available=available,
        error=problem,
    )


def device_for(hardware: Hardware) -> torch.device:
    """The device of this process. Raises UserError if the machine has a GPU that torch cannot use.

    A run on `1xcpu` was asked for; a run on the CPU because torch lacks CUDA, or nobody listed the GPUs, was not.
    """
    if hardware.gpu is None:
        if hardware.detected and torch.cuda.is_available():
            raise UserError(
                f"torch sees {torch.cuda.device_count()} GPUs, but nvidia-smi, which tells their size, is not there",
                f"put nvidia-smi on the PATH, or name them: --gpus 1x{torch.cuda.get_device_name(0).split()[-1]}",
            )
        return torch.device("cpu")
    facts, gpus = torch_facts(), machine.detected_gpus()
    problem = machine.torch_gpu_problem(facts, gpus)
    if problem is not None:
        raise problem
    if not facts.is_available:
        raise UserError(
            f"hardware is {hardware.text}, but this machine has no GPU that the driver reports",
            "run this on the machine with the GPUs; memfit estimate forecasts for hardware that is not here; "
            "--gpus 1xcpu trains on the CPU",
        )
    there = torch.cuda.device_count()
    if there < hardware.gpus_per_node:
        raise UserError(
            f"hardware is {hardware.text}, and torch sees {there} GPU{'s' * (there != 1)} on this machine",
            f"--gpus {there}x and the GPU's name, or see CUDA_VISIBLE_DEVICES and memfit doctor",
        )
    # Asking torch which one is current would start CUDA, which takes memory of the first GPU: the command that starts
    # the ranks asks too, and stays beside them.
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else rank_facts().local_rank
    return torch.device("cuda", index)


def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers alone. zero.Init places parameters, and what torch makes inside it; a buffer that was made from
    numpy stays in host memory (deepspeed.runtime.engine:DeepSpeedEngine._configure_distributed_model moves none)."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                module._buffers[name] = buffer.to(device)


def waits_for_engine(recipe: Recipe) -> bool:
    """Whether the model stays in host memory until an engine takes each rank's share of it to the device."""
    return distributed.is_initialized() and recipe.levers.parallel in {"zero3", "fsdp"}
