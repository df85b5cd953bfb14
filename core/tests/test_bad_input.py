"""What is refused: a clear error of our own, and everything as it was before the call."""

import collections
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from core_toys import KINDS, Trainer, assert_same, device_bytes, moved, places, snapshot

import megastow
from megastow import (
    AdapterSelectionError,
    HostMemoryError,
    InvalidArgumentError,
    InvalidTypeError,
    ManagerClosedError,
    MegastowError,
    Residency,
    StateChangedError,
    UnsupportedLayoutError,
    UnsupportedTensorError,
    create_memory_manager,
    create_trainer_memory_manager,
    host,
    machine,
    swap,
)


def refuses(error, match, call, tensors):
    """`call` raises our error with those words, and moves nothing; returns the error."""
    before, where = snapshot(tensors), places(tensors)
    with pytest.raises(error, match=match) as raised:
        call()
    assert isinstance(raised.value, MegastowError)
    assert places(tensors) == where
    assert_same(before, snapshot(tensors))
    return raised.value


def works(manager, tensors):
    before = snapshot(tensors)
    manager.offload(keep_grads=True)
    assert device_bytes(moved(tensors)) == 0
    manager.onload()
    assert_same(before, snapshot(tensors))


def model_with(extra, *, name="extra"):
    """A linear layer with one more tensor."""
    model = torch.nn.Linear(4, 4)
    model.register_buffer(name, extra)
    return model


# --- the arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "model", 7, lambda x: x, torch.zeros(3), [torch.nn.Linear(2, 2), "x"], {}])
def test_not_a_module(model):
    with pytest.raises(InvalidTypeError, match=r"expected a torch\.nn\.Module") as raised:
        create_memory_manager(model)
    assert type(model[-1] if isinstance(model, list) else model).__qualname__ in str(raised.value)
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize("model", [[], (), torch.nn.ModuleList()])
def test_empty_list(model):
    with pytest.raises(InvalidArgumentError, match="empty list"):
        create_memory_manager(model)


def test_wrong_optimizer_lists_the_reasons_of_each_adapter():
    model = torch.nn.Linear(2, 2)
    error = refuses(
        AdapterSelectionError, "plain: ", lambda: create_memory_manager(model, "adam"), dict(model.named_parameters())
    )
    assert "the optimizer is a builtins.str" in str(error)
    for name in megastow.registry.adapters():
        assert f"- {name}: " in str(error)


@pytest.mark.parametrize("sizes", [{"bucket_bytes": 0}, {"bucket_bytes": -1}, {"chunk_bytes": 0}, {"chunk_bytes": -5}])
def test_sizes_that_are_not_positive(sizes):
    with pytest.raises(InvalidArgumentError, match=rf"{next(iter(sizes))} is {next(iter(sizes.values()))}"):
        create_memory_manager(torch.nn.Linear(2, 2), **sizes)


@pytest.mark.parametrize("size", ["64MiB", 1.5, None])
def test_sizes_that_are_not_numbers(size):
    with pytest.raises(InvalidTypeError, match="whole number"):
        create_memory_manager(torch.nn.Linear(2, 2), chunk_bytes=size)


def test_unknown_adapter():
    with pytest.raises(AdapterSelectionError, match=r"there is no adapter 'mcroe'.*plain"):
        create_memory_manager(torch.nn.Linear(2, 2), adapter="mcroe")


@pytest.mark.parametrize("kind", ["weight", "", None, 3, ["weights"], b"weights"])
def test_unknown_kind(trainer, kind):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    tensors = trainer.tensors()
    for call in (
        manager.offload,
        manager.onload,
        manager.residency,
        manager.prepare,
        manager.offloaded(kind).__enter__,
    ):
        arguments = () if call.__name__ == "__enter__" else (kind,)
        error = refuses(InvalidArgumentError, "'main_weights'", lambda c=call, a=arguments: c(*a), tensors)
        assert repr(kind) in str(error)
    refuses(InvalidArgumentError, "no kind", lambda: manager.offload("weights", kind), tensors)
    works(manager, tensors)


def test_closed_manager(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    manager.close()
    for call in (manager.offload, manager.onload, manager.prepare):
        refuses(ManagerClosedError, "closed", call, trainer.tensors())
    works(create_memory_manager(trainer.model, trainer.optimizer), trainer.tensors())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"use_distributed_optimizer": True}, "use_distributed_optimizer is given as True"),
        ({"params_dtype": torch.float16}, r"params_dtype is given as torch\.float16.*torch\.bfloat16"),
        ({"bucket_size_mb": -1}, "bucket_size_mb is -1"),
        ({"host_memory": "tape"}, "host_memory is 'tape'"),
    ],
)
def test_the_classic_factory_checks_what_it_is_told(trainer, wrong, words):
    told = {
        "use_distributed_optimizer": False,
        "accumulate_allreduce_grads_in_fp32": True,
        "params_dtype": torch.bfloat16,
    }
    attributes = [dict(vars(m)) for m in trainer.model.modules()]

    def make(**changes):
        return create_trainer_memory_manager(trainer.model, trainer.optimizer, **{**told, **changes})

    refuses(InvalidArgumentError, words, lambda: make(**wrong), trainer.tensors())
    assert [dict(vars(m)) for m in trainer.model.modules()] == attributes
    works(make(bucket_size_mb=1), trainer.tensors())


# --- the model and its tensors ---------------------------------------------------------------------------------------


def test_no_parameters():
    with pytest.raises(InvalidArgumentError, match="no parameters"):
        create_memory_manager(torch.nn.ReLU())


def test_parameters_on_several_devices():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(InvalidArgumentError, match=r"2 on cpu, 2 on meta.*one manager for the modules on each device"):
        create_memory_manager(model)


def test_parameters_on_a_device_that_cannot_be_moved():
    with pytest.raises(InvalidArgumentError, match="on meta"):
        create_memory_manager(torch.nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize("lazy", [torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d(affine=False)])
def test_lazy_modules(lazy):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), lazy)
    with pytest.raises(MegastowError, match=r"1\..*not initialised yet.*forward pass"):
        create_memory_manager(model)
    model(torch.ones(2, 2))
    works(create_memory_manager(model), {n: p.detach() for n, p in model.named_parameters()})


def foreign_numpy(_):
    return torch.from_numpy(np.arange(4.0))


def foreign_file(folder):
    torch.save({"t": torch.arange(4.0)}, folder / "t.pt")
    return torch.load(folder / "t.pt", mmap=True)["t"]


def foreign_shared(_):
    return torch.arange(4.0).share_memory_()


@pytest.mark.parametrize(
    ("make", "words"),
    [(foreign_numpy, "cannot be resized"), (foreign_file, "cannot be resized"), (foreign_shared, "shared with other")],
)
def test_storages_that_belong_to_somebody_else(make, words, tmp_path):
    model = model_with(make(tmp_path))
    tensors = {**dict(model.named_parameters()), "extra": model.extra}
    refuses(UnsupportedTensorError, f"extra.*{words}.*Clone", lambda: create_memory_manager(model), tensors)
    model.extra = model.extra.clone()
    works(create_memory_manager(model), {**dict(model.named_parameters()), "extra": model.extra})


def test_a_foreign_storage_that_comes_later_is_refused_before_anything_moves():
    model = model_with(torch.zeros(4))
    manager = create_memory_manager(model)
    model.extra = torch.from_numpy(np.arange(4.0))
    tensors = {**dict(model.named_parameters()), "extra": model.extra}
    refuses(UnsupportedTensorError, "extra", manager.offload, tensors)
    assert all(manager.residency(k) is Residency.RESIDENT for k in KINDS)
    model.extra = torch.zeros(4)
    works(manager, {**dict(model.named_parameters()), "extra": model.extra})


class Wrapper(torch.Tensor):
    """A tensor that only holds another one, like a quantised weight, and does not say so."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


class OpenWrapper(Wrapper):
    """The same, and it says so."""

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return OpenWrapper(inner["inner"])


@pytest.mark.parametrize("place", ["parameter", "buffer", "attribute"])
def test_a_wrapper_subclass_must_name_what_it_wraps(place):
    def model_of(wrapper):
        model = torch.nn.Linear(4, 4)
        if place == "parameter":
            model.extra = torch.nn.Parameter(wrapper, requires_grad=False)
        elif place == "buffer":
            model.register_buffer("extra", wrapper)
        else:
            model.extra = wrapper
        return model

    model = model_of(Wrapper(torch.arange(4.0)))
    tensors = {"weight": model.weight, "inner": model.extra.inner}
    refuses(UnsupportedTensorError, "extra.*Wrapper.*__tensor_flatten__", lambda: create_memory_manager(model), tensors)
    model = model_of(OpenWrapper(torch.arange(4.0)))
    works(create_memory_manager(model), {"weight": model.weight, "inner": model.extra.inner})


def test_sparse_tensors():
    model = model_with(torch.eye(4).to_sparse())
    refuses(
        UnsupportedTensorError,
        r"extra has layout torch\.sparse_coo",
        lambda: create_memory_manager(model),
        {"weight": model.weight},
    )


def test_sparse_gradients_are_refused_when_they_appear():
    model = torch.nn.Embedding(8, 4, sparse=True)
    manager = create_memory_manager(model)
    model(torch.tensor([1])).sum().backward()
    refuses(UnsupportedTensorError, r"weight\.grad has layout", manager.offload, {"weight": model.weight})
    model.weight.grad = None
    works(manager, {"weight": model.weight})


def test_scripted_modules_cannot_be_guarded():
    model = torch.nn.Sequential(torch.jit.script(torch.nn.Linear(2, 2)))
    refuses(UnsupportedLayoutError, "0 is a scripted module", lambda: create_memory_manager(model), {})


def test_sharding_wrappers_release_storages_themselves():
    class FSDPModule(torch.nn.Linear):  # a fake: the real one needs a process group
        pass

    model = torch.nn.Sequential(FSDPModule(2, 2))
    refuses(UnsupportedLayoutError, "0 is wrapped by torch's FSDPModule", lambda: create_memory_manager(model), {})


# --- what is elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_offloaded_is_refused_by_a_second_manager(trainer, kind):
    tensors = trainer.tensors()
    before = snapshot(tensors)
    early = create_memory_manager(trainer.model, trainer.optimizer)
    first = create_memory_manager(trainer.model, trainer.optimizer)
    first.offload(kind, keep_grads=True)
    for call in (lambda: create_memory_manager(trainer.model, trainer.optimizer), lambda: early.offload(kind)):
        with pytest.raises(StateChangedError, match="released by another manager or by other code"):
            call()
    assert early.residency(kind) is Residency.RESIDENT
    assert first.residency(kind) is Residency.OFFLOADED
    first.onload()
    assert_same(before, snapshot(tensors))
    works(early, tensors)
    works(first, tensors)


def test_a_released_storage_that_somebody_resized_is_not_written_to(trainer):
    before = snapshot(trainer.tensors(("weights",)))
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    manager.offload("weights")
    storage = trainer.model.frozen.untyped_storage()
    storage.resize_(4)
    with pytest.raises(StateChangedError, match="resize it to 0 again"):
        manager.onload()
    assert manager.residency("weights") is Residency.OFFLOADED
    storage.resize_(0)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(("weights",))))


def meminfo(folder: Path, total, available):
    (folder / "proc").mkdir(exist_ok=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: {total >> 10} kB\nMemAvailable: {available >> 10} kB\n")
    return folder


@pytest.mark.parametrize("call", ["offload", "prepare"])
@pytest.mark.parametrize("starved_from", [0, 1])
def test_host_memory_that_does_not_suffice(trainer, tmp_path, monkeypatch, call, starved_from):
    real, asked = machine.host_limits, []

    def limits():
        asked.append(None)
        short = len(asked) > starved_from
        return real(root=meminfo(tmp_path, 1 << 40, 1024 if short else 1 << 40))

    manager = create_memory_manager(trainer.model, trainer.optimizer)
    monkeypatch.setattr(host.machine, "host_limits", limits)
    attempt = manager.offload if call == "offload" else (lambda: manager.prepare(wait=True))
    if starved_from:  # memory that vanishes between the check and the allocation: packed, not moved
        before = snapshot(trainer.tensors())
        with pytest.raises(HostMemoryError, match="1 KiB of 1 TiB") as raised:
            attempt()
        assert_same(before, snapshot(trainer.tensors()))
        error = raised.value
    else:
        error = refuses(HostMemoryError, "1 KiB of 1 TiB", attempt, trainer.tensors())
    assert re.search(r"needs \d.* of host memory", str(error))
    assert isinstance(error, MemoryError)
    assert all(manager.residency(k) is Residency.RESIDENT for k in KINDS)
    trainer.step()
    monkeypatch.setattr(host.machine, "host_limits", real)
    works(manager, trainer.tensors())


def test_all_ranks_of_a_host_are_counted(trainer, tmp_path, monkeypatch):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    real = machine.host_limits
    monkeypatch.setattr(host.machine, "host_limits", lambda: real(root=meminfo(tmp_path, 1 << 20, 1 << 20)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    refuses(HostMemoryError, "in all 1000 processes", manager.offload, trainer.tensors())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    works(manager, trainer.tensors())


def test_every_error_can_be_caught_by_one_name_and_by_its_builtin():
    errors = [e for e in vars(megastow.errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert all(issubclass(e, MegastowError) for e in errors)
    builtin = (ValueError, TypeError, LookupError, RuntimeError)
    assert all(issubclass(e, builtin) for e in errors if e is not MegastowError)
    assert collections.Counter(e.__name__ for e in errors).most_common(1)[0][1] == 1


def test_a_refused_model_can_be_trained_on():
    trainer, twin = Trainer(), Trainer()
    trainer.model.bad = torch.from_numpy(np.arange(3.0))
    with pytest.raises(UnsupportedTensorError):
        create_memory_manager(trainer.model, trainer.optimizer)
    for t in (trainer, twin):
        t.step()
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))


def test_graphs_over_the_addresses_of_a_plain_module(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    works(manager, trainer.tensors())

    def replay(tokens):
        raise AssertionError("not called")

    replay.__qualname__ = "make_graphed_callables.<locals>.new_fwd"  # capturing needs a GPU
    trainer.model.layers[1].forward = replay
    refuses(UnsupportedLayoutError, r"forward of module layers\.1 hold CUDA graphs", manager.offload, trainer.tensors())
    del trainer.model.layers[1].forward
    works(manager, trainer.tensors())


# --- arguments of calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"replicas": "no"}, {"derive_weights": None}, {"bucket_bytes": True}, {"group": 3}]
)
def test_what_a_manager_is_made_with(trainer, options):
    (name,) = options
    refuses(
        InvalidTypeError,
        f"{name} is a",
        lambda: create_memory_manager(trainer.model, trainer.optimizer, **options),
        trainer.tensors(),
    )


def test_a_folder_without_a_name(trainer):
    refuses(
        InvalidArgumentError,
        "disk_folder is empty",
        lambda: create_memory_manager(trainer.model, trainer.optimizer, host_memory="disk", disk_folder=""),
        trainer.tensors(),
    )


WRONG_OPTIONS = [
    ("offload", {"keep_grads": None}, InvalidTypeError),
    ("offload", {"release_workspaces": "yes"}, InvalidTypeError),
    ("offload", {"give_back": "no"}, InvalidTypeError),
    ("offload", {"strict": 1}, InvalidTypeError),
    ("offload", {"non_blocking": "x"}, InvalidTypeError),
    ("offload", {"max_residue_bytes": True}, InvalidTypeError),
    ("onload", {"non_blocking": None}, InvalidTypeError),
    ("onload", {"unverified": "x"}, InvalidTypeError),
    ("onload", {"wait_for_memory": None}, InvalidTypeError),
    ("onload", {"wait_for_memory": "5"}, InvalidTypeError),
    ("onload", {"wait_for_memory": True}, InvalidTypeError),
    ("onload", {"wait_for_memory": -1}, InvalidArgumentError),
    ("onload", {"wait_for_memory": float("nan")}, InvalidArgumentError),
    ("onload", {"window_bytes": 1.5}, InvalidTypeError),
    ("onload", {"window_bytes": -1}, InvalidArgumentError),
    ("onload", {"beside": "x"}, InvalidTypeError),
    ("plan", {"keep_grads": 1}, InvalidTypeError),
    ("prepare", {"wait": 1}, InvalidTypeError),
    ("explain_residue", {"most_storages": 1.5}, InvalidTypeError),
    ("close", {"discard": "no"}, InvalidTypeError),
]


@pytest.mark.parametrize(("call", "options", "expected"), WRONG_OPTIONS)
@pytest.mark.parametrize("is_away", [False, True])
def test_options_of_the_wrong_sort(trainer, call, options, expected, is_away):
    before = snapshot(trainer.tensors())
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    if is_away:
        manager.offload(keep_grads=True)
    where = [manager.residency(kind) for kind in KINDS]
    (name,) = options
    with pytest.raises(expected, match=f"{name} is .*; expected"):
        getattr(manager, call)(**options)
    assert [manager.residency(kind) for kind in KINDS] == where
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    works(manager, trainer.tensors())


def test_the_result_in_place_of_the_function(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    with pytest.raises(InvalidTypeError, match=r"model\.state_dict \(not model\.state_dict\(\)"):
        manager.on_host(trainer.model.state_dict())


def test_a_swap_needs_two(trainer):
    manager, tensors = create_memory_manager(trainer.model, trainer.optimizer), trainer.tensors()
    refuses(InvalidArgumentError, "the same memory manager", lambda: swap(manager, manager), tensors)
    refuses(InvalidTypeError, "leaving is a str", lambda: swap("x", manager), tensors)
    refuses(InvalidTypeError, "coming is a NoneType", lambda: swap(manager, None), tensors)
    refuses(InvalidTypeError, "window_bytes is a float", lambda: swap(manager, manager, window_bytes=0.5), tensors)
    works(manager, tensors)
