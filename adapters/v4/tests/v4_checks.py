"""Checks that worker processes run on trainers of the v4 double, beside those of the suite.

The test process, where there is no Megatron, imports them too, to name them.
"""

import re

import pytest
import torch

from megastow import AdapterSelectionError, InvalidTypeError, StateKind, create_memory_manager
from megastow_conformance import oracle
from megastow_conformance.checks import training
from megastow_conformance.checks.common import trained
from megastow_conformance.trainer import Point


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _flat(groups):
    return [tensor for group in groups for tensor in group]


# --- the double keeps to what is known of the fork --------------------------------------------------------------------


def wrapper_is_as_described(case):
    from megatron.model.distributed import ParamBufferType, get_param_buffer_type

    trainer = trained(case)
    assert [member.name for member in ParamBufferType] == ["allreduce", "moe"]
    for chunk in trainer.model:
        trained_params = [p for _, p in chunk.module.named_parameters() if p.requires_grad]
        assert len(chunk.grad_accs) == len(trained_params)
        assert all(p.grad_added_to_main_grad is False for p in trained_params)
        places = {}
        for param in trained_params:
            kind = ParamBufferType.moe if getattr(param, "allreduce", True) is False else ParamBufferType.allreduce
            assert get_param_buffer_type(param) is kind
            dtype = torch.float32 if case.scenario.grad_reduce_in_fp32 else param.dtype
            buffer = chunk._grad_buffers[kind][dtype]
            assert buffer.dtype == buffer.data.dtype == dtype
            assert buffer.data.shape == (buffer.numel_padded,)
            assert buffer.get(torch.Size([1]), 0).data_ptr() == buffer.data.data_ptr()
            assert _storage(param.main_grad) == _storage(buffer.data)
            places.setdefault((kind, dtype), []).append((param.main_grad.storage_offset(), param.numel()))
        assert {kind for kind, _ in places} == {kind for kind, of_kind in chunk._grad_buffers.items() if of_kind}
        for in_order in places.values():
            end = sum(numel for _, numel in in_order)
            for start, numel in in_order:  # the last parameter is the first in the buffer
                assert start + numel == end
                end = start


def distributed_optimizer_is_as_described(case):
    from megatron.model.distributed import ParamBufferType, get_param_buffer_type

    trainer = case.build()
    optimizer = trainer.optimizer

    def at(point):
        if point is Point.AFTER_STEP and case.scenario.grad_reduce_in_fp32:
            grads = {_storage(p.main_grad) for chunk in trainer.model for p in chunk.parameters() if p.requires_grad}
            assert all(_storage(main.grad) in grads for main in _flat(optimizer.shard_fp32_from_float16_groups))

    trainer.train_step(0, at)
    assert optimizer.models == trainer.model
    for kind in ParamBufferType:
        assert len(optimizer.param_buffers[kind]) == len(trainer.model)
        for chunk, by_dtype in zip(trainer.model, optimizer.param_buffers[kind], strict=True):
            assert by_dtype.keys() == chunk._grad_buffers[kind].keys()
            for dtype, staging in by_dtype.items():
                buffer = chunk._grad_buffers[kind][dtype]
                assert staging.dtype == optimizer.params_dtype
                assert staging.shape == (buffer.numel_padded,)
                assert staging.data_ptr() == buffer.data.data_ptr()
    params, shards = [], []
    for of_dtype in ("float16", "fp32"):
        params += _flat(getattr(optimizer, f"model_{of_dtype}_groups"))
        shards += _flat(getattr(optimizer, f"shard_{of_dtype}_groups"))
    assert len(params) == len(shards) > 0
    for param, shard in zip(params, shards, strict=True):
        kind = get_param_buffer_type(param)
        index, dtype = optimizer.model_param_gbuf_map[kind][param]
        part = optimizer.model_gbuf_ranges[index][kind][dtype]["param_map"][param]["param"]
        assert shard.dim() == 1
        assert shard.dtype == param.dtype
        assert shard.data_ptr() == param.view(-1)[part.start : part.end].data_ptr()
        assert shard.numel() == part.end - part.start
    assert not any(shard.requires_grad for shard in _flat(optimizer.shard_float16_groups))
    mains = _flat(optimizer.shard_fp32_from_float16_groups)
    assert all(main.dtype is torch.float32 for main in mains)
    assert len({_storage(main) for main in mains}) == len(mains)
    for group, fp32, main in zip(
        optimizer.optimizer.param_groups,
        optimizer.shard_fp32_groups,
        optimizer.shard_fp32_from_float16_groups,
        strict=True,
    ):
        assert [id(p) for p in group["params"]] == [id(p) for p in (*fp32, *main)]
    assert len(_flat(group["params"] for group in optimizer.opt_group_ranges)) == len(params)


def ranks_reduce_by_type(case):
    """Experts spread over both ranks: each has its own, and dense parameters stay the same on both."""
    from megatron.core import parallel_state
    from megatron.model.distributed import ParamBufferType, get_param_buffer_type

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=case.world)
    case.on_close(parallel_state.destroy_model_parallel)
    training.training(case)
    trainer = trained(case)
    for name, param in trainer.model[0].named_parameters():
        mine = oracle.as_bytes(param)
        everyones = [None] * case.world
        torch.distributed.all_gather_object(everyones, mine)
        is_same = all(torch.equal(mine, other) for other in everyones)
        assert is_same == (get_param_buffer_type(param) is ParamBufferType.allreduce), name


# --- the adapter ------------------------------------------------------------------------------------------------------


def storages_are_told_apart(case):
    """Every gradient storage, of both types, is listed as gradients; every parameter as a weight."""
    trainer = trained(case)
    manager = case.manager(trainer)
    report = manager.offload("grad_buffers")
    buffers = [b for chunk in trainer.model for by_dtype in chunk._grad_buffers.values() for b in by_dtype.values()]
    assert len(buffers) > 1
    assert report.kinds[StateKind.GRAD_BUFFERS].device_bytes == sum(b.numel_padded * b.dtype.itemsize for b in buffers)
    assert all(buffer.data.untyped_storage().nbytes() == 0 for buffer in buffers)
    assert all(param.untyped_storage().nbytes() > 0 for chunk in trainer.model for param in chunk.parameters())
    manager.onload()


def facts_are_what_was_asked_for(case):
    trainer = case.build()
    assert dict(case.manager(trainer).facts) == {
        "use_distributed_optimizer": case.scenario.distributed_optimizer,
        "accumulate_allreduce_grads_in_fp32": case.scenario.grad_reduce_in_fp32,
        "params_dtype": trainer.optimizer.params_dtype,
    }


def model_without_optimizer(case):
    trainer = trained(case)
    before = oracle.snapshot(trainer.named_state())
    manager = create_memory_manager(trainer.model)
    case.on_close(manager.close)
    with manager.offloaded():
        assert all(p.untyped_storage().nbytes() == 0 for chunk in trainer.model for p in chunk.parameters())
    oracle.assert_same(before, oracle.snapshot(trainer.named_state()), "state")


def refuses_another_optimizer(case):
    trainer = case.build()
    _expect(InvalidTypeError, "megatron.optimizer.optimizer.FP32Optimizer", trainer.model, trainer.optimizer)


def refuses_another_dtype(case):
    trainer = case.build()
    wide = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)
    trainer.model[0].module.register_parameter("wide", wide)
    message = _expect(InvalidTypeError, "torch.float64", trainer.model, trainer.optimizer)
    assert "wide" in message


def refuses_another_wrapper(case):
    trainer = case.build()
    inner = trainer.model[0].module
    _expect(AdapterSelectionError, type(inner).__qualname__, inner, trainer.optimizer)
    _expect(AdapterSelectionError, type(inner).__qualname__, inner, trainer.optimizer, adapter="v4")


def _expect(error, part, *arguments, **options):
    with pytest.raises(error, match=re.escape(part)) as raised:
        create_memory_manager(*arguments, **options)
    return str(raised.value)
