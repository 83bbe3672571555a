"""DeepSpeed's compiled operators, found or built before anything heavy is loaded."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable

from memfit.catalog.precisions import ZERO
from memfit.errors import UserError
from memfit.inputs.toolchain import CPU_ADAM, SHARED_MEMORY, Toolchain, find_toolchain, is_live
from memfit.specs.plan import Plan
from memfit.strategies import STRATEGIES

Say = Callable[[str], None]
BUILD_SECONDS = 1800
# In a process of its own: DeepSpeed chooses its accelerator once, when it is imported.
# Source: deepspeed.ops.op_builder.cpu; the host optimizer of a GPU machine has the same builder there.
BUILD = """
import sys
from memfit.inputs.processes import prepare_environment
prepare_environment(sys.argv[2] == "cpu")
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder(sys.argv[1]).load(verbose=False)
"""
BUILDERS = {CPU_ADAM: "CPUAdamBuilder", SHARED_MEMORY: "ShareMemCommBuilder"}


def prepare_operators(plan: Plan, say: Say) -> tuple[str, ...]:
    """Find or build what the plan's engine compiles on first use; returns the operators that had to be built.

    Without CPU Adam, torch's fused AdamW takes its place in host memory: the same states and no temporaries, priced
    alike but for the 4 bytes of a step counter a group. Raises UserError where DeepSpeed is missing, or where
    nothing can stand in.
    """
    name = str(plan.recipe.levers.parallel)
    if name not in ZERO:
        return ()
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"levers.parallel: {name} needs the package deepspeed, which is not installed",
            "pip install 'memfit[deepspeed]', or levers.parallel: fsdp",
        )
    cpu = plan.forecast.hardware.gpu is None
    wanted = [SHARED_MEMORY] if cpu else []
    wanted += [CPU_ADAM] if STRATEGIES[name].engine_config(plan)["zero_force_ds_cpu_optimizer"] else []
    tools = find_toolchain()
    missing = [operator for operator in wanted if operator not in tools.built]
    if not missing:
        return ()
    if tools.locks:
        lock = tools.locks[0]
        if is_live(lock):
            raise UserError(f"{lock.parent} is being compiled by another run", "start this one when that is done")
        raise UserError(
            f"{lock} is there and nobody compiles behind it: a run was killed while it did, and every later one would "
            "wait for ever",
            f"rm {lock}",
        )
    built = []
    for operator in missing:
        problem = tools.problem()
        if problem is None:
            say(f"compiling DeepSpeed's {operator} into {tools.folder}, once (a minute or two)")
            problem = build_operator(operator, cpu)
        if problem is None:
            built.append(operator)
        elif operator == CPU_ADAM:
            _stand_in(plan, problem, tools, say)
        else:
            # deepspeed.comm.torch:TorchBackend.__init__ builds it on CPU ranks and has no way around it.
            raise UserError(
                f"DeepSpeed's {operator}, which CPU ranks need, cannot be compiled: {problem}",
                f"{tools.hint()}; or levers.parallel: fsdp",
            )
    return tuple(built)


def build_operator(operator: str, cpu: bool) -> str | None:
    """Compile one operator in a process of its own; why that failed, in one line, or None."""
    words = [sys.executable, "-c", BUILD, BUILDERS[operator], "cpu" if cpu else "gpu"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"the compiler was not done after {BUILD_SECONDS // 60} minutes"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else f"exit code {done.returncode}")


def _stand_in(plan: Plan, problem: str, tools: Toolchain, say: Say) -> None:
    """Say that torch's AdamW stands in for CPU Adam, or stop where it would take memory that nobody priced, or where
    DeepSpeed takes no other (deepspeed.runtime.base_optimizer:_configure_master_weights)."""
    if plan.recipe.levers.precision == "pure-bf16":
        raise UserError(
            f"levers.precision: pure-bf16 with offload needs DeepSpeed's CPU Adam, which cannot be compiled: {problem}",
            f"{tools.hint()}; or levers.precision: bf16-mixed, whose fp32 weights torch's AdamW steps on the host",
        )
    if plan.recipe.levers.optimizer != "adamw":
        raise UserError(
            f"levers.offload needs DeepSpeed's CPU Adam, which cannot be compiled: {problem}",
            f"{tools.hint()}; or levers.optimizer: adamw, which torch steps in host memory without temporaries",
        )
    say(
        f"DeepSpeed's CPU Adam cannot be compiled ({problem}): torch's fused AdamW steps in host memory instead, "
        f"more slowly; {tools.hint()}"
    )
