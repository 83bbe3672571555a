"""The upstream facts that engine terms rest on: an upgrade that moves one fails here, with the term's name."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group, _fsdp_state
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from memfit.strategies.base import AUTOMATIC
from memfit.strategies.zero import VALUES


def test_fsdp_gathered_and_scatter_input() -> None:
    """fsdp.gathered: the root keeps its parameters when nothing is said; the collective's buffer lives beside them."""
    # fully_shard is the implementation wrapped by a contract; its own source says how the root is treated.
    assert "reshard_after_forward" in inspect.signature(fully_shard).parameters
    assert "_auto_reshard_after_forward" in inspect.getsource(_fsdp_state)
    waiting = inspect.getsource(_fsdp_param_group.FSDPParamGroup.wait_for_unshard)
    assert "all_gather_state" in waiting
    assert "reduce_scatter_states" in inspect.getsource(_fsdp_param_group.FSDPParamGroup.post_backward)
    assert "dtype=reduce_dtype" in inspect.getsource(_fsdp_collectives.foreach_reduce)


def test_ddp_gradient_copies() -> None:
    assert inspect.signature(DistributedDataParallel).parameters["gradient_as_bucket_view"].default is False


def test_transformers_automatic_values() -> None:
    """zero*.reduce_bucket under "auto" and its two companions."""
    text = inspect.getsource(HfTrainerDeepSpeedConfig.trainer_config_finalize)
    for key, formula in (
        ("reduce_bucket_size", "hidden_size * hidden_size"),
        ("stage3_prefetch_bucket_size", "int(0.9 * hidden_size * hidden_size)"),
        ("stage3_param_persistence_threshold", "10 * hidden_size"),
    ):
        assert formula in text, key
        assert AUTOMATIC[key](100) == eval(formula, {"hidden_size": 100})


def test_deepspeed_defaults() -> None:
    """Every value that memfit takes where the recipe says nothing is DeepSpeed's own, overlap_comm aside."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    found = config.DeepSpeedZeroConfig(stage=3)
    for key, value in VALUES.items():
        if key != "overlap_comm":
            assert getattr(found, key.removeprefix("stage3_")) == value, key


def test_deepspeed_buffers() -> None:
    """zero2.reduce_bucket, zero3.reduce_bucket, zero3.gathered, zero2.offload_*: where the source makes them."""
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2").DeepSpeedZeroOptimizer
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3").DeepSpeedZeroOptimizer_Stage3
    coordinator = pytest.importorskip("deepspeed.runtime.zero.partitioned_param_coordinator")
    assert "torch.empty(int(self.reduce_bucket_size)" in inspect.getsource(stage2.setup_buckets)
    assert "self.nccl_start_alignment_factor = 2" in inspect.getsource(stage2)
    assert "param_buffer_of_bit16_for_cpu_offload_groups" in inspect.getsource(stage2)
    assert "grad_partitions_flat_buffer" in inspect.getsource(stage3)
    assert "self.flatten(self.averaged_gradients" in inspect.getsource(stage3)
    fetch = inspect.getsource(coordinator.PartitionedParameterCoordinator)
    assert "self.__max_n_available_params - self.__n_available_params" in fetch


def test_deepspeed_waits_for_a_whole_collective() -> None:
    """zero3.gathered: one wait copies every parameter out of the flat buffer, which the handle goes on holding; the
    registry holds the handle for each parameter until its own module comes."""
    partition = pytest.importorskip("deepspeed.runtime.zero.partition_parameters")
    coordinator = pytest.importorskip("deepspeed.runtime.zero.partitioned_param_coordinator")
    flat = torch.zeros(12)
    parameters = []
    for size in (2, 4):
        one = torch.nn.Parameter(torch.empty(0))
        one.ds_status, one.ds_numel, one.ds_shape = partition.ZeroParamStatus.INFLIGHT, 2 * size, (2, size)
        one.ds_tensor = torch.empty(size)
        one.ds_tensor.ds_numel = size
        parameters.append(one)
    waiting = SimpleNamespace(wait=lambda: None)
    handle = partition.AllGatherCoalescedHandle(waiting, parameters, [flat[:6], flat[6:]], world_size=2)
    handle.wait()
    assert [one.ds_status for one in parameters] == [partition.ZeroParamStatus.AVAILABLE] * 2
    places = {one.untyped_storage().data_ptr() for one in parameters}
    assert len(places) == 2
    assert flat.untyped_storage().data_ptr() not in places
    assert handle.partitions[0].untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    fetch = inspect.getsource(coordinator.PartitionedParameterCoordinator._fetch_sub_module_impl)
    assert "self.__inflight_param_registry.pop(param).wait(" in fetch


def test_deepspeed_copies_weights_that_have_the_masters_dtype_already() -> None:
    """`Counting.has_master`: the way around the copy compares a device with a name, which torch says is never equal."""
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3").DeepSpeedZeroOptimizer_Stage3
    assert "self.fp16_partitioned_groups_flat[i].device == self.device" in inspect.getsource(stage3)
    assert "self.device = get_accelerator().current_device_name()" in inspect.getsource(stage3)
    assert torch.zeros(1).device != "cpu"


def test_accelerate_spreads_the_first_ranks_weights() -> None:
    """memfit.build.shell: parameters are broadcast one by one, and found again by their addresses; and
    memfit.build.loss: the head's group stays gathered from forward to backward."""
    from accelerate import Accelerator
    from accelerate.utils import fsdp_utils

    assert "dist.broadcast(full_tensor, src=0" in inspect.getsource(fsdp_utils.fsdp2_load_full_state_dict)
    prepare = inspect.getsource(fsdp_utils.fsdp2_prepare_model)
    assert "if fsdp2_plugin.cpu_ram_efficient_loading" in prepare
    assert 'fully_shard(tail, **{**fsdp2_kwargs, "reshard_after_forward": False})' in prepare
    assert "p.data_ptr()" in inspect.getsource(Accelerator._prepare_fsdp2)


def test_zero3_loading_reads_on_the_first_rank_only() -> None:
    from transformers.modeling_utils import PreTrainedModel

    text = inspect.getsource(PreTrainedModel._load_pretrained_model)
    assert 'map_location = "cpu" if torch.distributed.get_rank() == 0 else "meta"' in text
