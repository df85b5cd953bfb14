"""Views on what is offloaded: the same bytes in the same shape, nothing moved, and memory that outlives every move."""

import copy
import gc
import io
import multiprocessing.pool
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from core_toys import KEPT, KINDS, Trainer, assert_same, junk, moved, raw, run_python, snapshot
from torch.testing._internal.two_tensor import TwoTensor

from megastow import (
    InvalidArgumentError,
    InvalidTypeError,
    ManagerClosedError,
    MegastowError,
    NotOnHostError,
    ReadOnlyError,
    Residency,
    UnsupportedTensorError,
    create_memory_manager,
    faults,
)

SIZES = [{}, {"bucket_bytes": 2048, "chunk_bytes": 100}, {"bucket_bytes": 1}]


def make(trainer, **sizes):
    return create_memory_manager(trainer.model, trainer.optimizer, **sizes)


def layout(tensor):
    storage = tensor.untyped_storage().nbytes()
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), storage


def cycle(manager):
    """Packed from here on, so that nothing lies elsewhere at the next offload."""
    with manager.offloaded():
        pass


@pytest.mark.parametrize("sizes", SIZES)
def test_a_view_has_the_bytes_and_the_layout_of_what_is_away(trainer, sizes):
    manager = make(trainer, **sizes)
    with manager.offloaded(keep_grads=True):
        pass
    tensors = moved(trainer.tensors())
    before, layouts = snapshot(tensors), {n: layout(t) for n, t in tensors.items()}
    manager.offload(keep_grads=True)
    held = manager.host_bytes
    views = {n: manager.host_tensor(t) for n, t in tensors.items()}
    assert_same(before, snapshot(views))
    assert {n: layout(v) for n, v in views.items()} == layouts
    assert manager.host_bytes == held
    assert all(t.untyped_storage().nbytes() == 0 for t in tensors.values())
    assert {manager.residency(kind) for kind in KINDS} == {Residency.OFFLOADED}
    del views
    manager.onload()
    assert_same(before, snapshot(tensors))


@pytest.mark.parametrize("tier", ["pageable", "disk"])
def test_a_view_of_what_is_in_another_tier_outlives_it_too(trainer, tier, disk_folder):
    manager = make(trainer, host_memory=tier, disk_folder=disk_folder)
    tensors = moved(trainer.tensors(KEPT))
    cycle(manager)
    before, layouts = snapshot(tensors), {n: layout(t) for n, t in tensors.items()}
    manager.offload()
    views = {n: manager.host_tensor(t) for n, t in tensors.items()}
    assert {n: layout(v) for n, v in views.items()} == layouts
    with pytest.raises(ReadOnlyError):
        next(iter(views.values())).zero_()
    manager.onload()
    trainer.step()
    manager.offload()
    assert_same(before, snapshot(views))
    manager.close()
    assert_same(before, snapshot(views))


def test_every_alias_of_an_offloaded_storage_has_a_view(trainer):
    model, manager = trainer.model, make(trainer)
    cycle(manager)
    weight = model.layers[1].weight
    flat = torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage())
    complex_numbers = torch.view_as_complex(trainer.main[0].detach().view(-1, 2))
    aliases = {
        "detached": weight.detach(),
        "row": weight.detach()[3],
        "every other": weight.detach()[::2, 1::3],
        "transposed": weight.detach().t(),
        "expanded": weight.detach()[:1].expand(5, -1),
        "bytes of all neighbours": flat,
        "other dtype": weight.detach().view(torch.int16),
        "complex": complex_numbers,
        "conjugated": complex_numbers.conj(),
        "negated": complex_numbers.conj().imag,
        "buffer view": model.odd_view,
        "attribute": model.table,
    }
    expected = {n: t.resolve_conj().resolve_neg().clone() for n, t in aliases.items()}
    manager.offload()
    for name, alias in aliases.items():
        view = manager.host_tensor(alias)
        assert torch.equal(raw(view.resolve_conj().resolve_neg()), raw(expected[name])), name
    views = [manager.host_tensor(alias) for alias in (weight, flat)]
    assert len({view.untyped_storage()._cdata for view in views}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_holds_all_that_went_with_a_kind(trainer, kind):
    model, manager = trainer.model, make(trainer)
    model.register_buffer("nothing", torch.empty(0, 3))
    cycle(manager)
    trainer.step()
    expected = [t for n, t in moved(trainer.tensors((kind,))).items() if n != "weights.table"]
    values = sorted(raw(t).numpy().tobytes() for t in expected if t.numel())
    manager.offload(kind, keep_grads=True)
    state = manager.host_state_dict(kind)
    assert sorted(raw(view).numpy().tobytes() for view in state.values() if view.numel()) == values
    for name, view in state.items():
        if view.numel():
            assert torch.equal(raw(view), raw(manager.host_tensor(name)))
    if kind == "weights":
        names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
        assert state.keys() == names
        assert (state["nothing"].shape, state["nothing"].device.type) == ((0, 3), "cpu")
        assert raw(manager.host_tensor("head.weight")).equal(raw(manager.host_tensor("embed.weight")))  # tied


def test_what_is_saved_while_away_is_what_would_have_been_saved(trainer):
    def saved(tensors):
        file = io.BytesIO()
        torch.save(tensors, file)
        return file.getvalue()

    manager = make(trainer)
    cycle(manager)
    names = [n for n, _ in trainer.model.state_dict(keep_vars=True).items() if n != "head.weight"]
    live = trainer.model.state_dict()
    expected, values = saved({n: live[n] for n in names}), snapshot({n: live[n] for n in names})
    with manager.offloaded():
        state = manager.host_state_dict("weights")
        found = saved({n: state[n] for n in names})
    assert found == expected
    loaded = torch.load(io.BytesIO(found))
    fresh = Trainer(seed=1)
    fresh.model.load_state_dict(loaded, strict=False)
    assert_same(values, snapshot({n: fresh.model.state_dict()[n] for n in names}))


def test_what_is_not_on_the_host_is_refused_and_says_why(trainer):
    manager = make(trainer)
    weight = trainer.model.layers[0].weight
    for ask in (lambda: manager.host_tensor(weight), lambda: manager.host_tensor("layers.0.weight")):
        with pytest.raises(
            NotOnHostError, match=r"layers\.0\.weight \(weights\) is on the cpu device.*offload weights"
        ):
            ask()
    with pytest.raises(NotOnHostError, match="weights is on the device"):
        manager.host_state_dict("weights")
    manager.offload("weights", "grad_buffers")
    with pytest.raises(
        InvalidArgumentError, match=r"no state is called 'layers\.0\.wait'; there is 'layers\.0\.weight'"
    ):
        manager.host_tensor("layers.0.wait")
    with pytest.raises(InvalidArgumentError, match=r"shape \(3,\) and torch.float32 on cpu belongs to no state"):
        manager.host_tensor(torch.zeros(3))
    with pytest.raises(InvalidTypeError, match="a int was given"):
        manager.host_tensor(3)
    with pytest.raises(UnsupportedTensorError, match=r"TwoTensor wraps other tensors.*inner ones \(a, b\)"):
        manager.host_tensor(TwoTensor(weight.detach(), weight.detach()))
    with pytest.raises(InvalidArgumentError, match="belongs to no state"):
        manager.host_tensor(torch.zeros(2, 2).to_sparse())
    with pytest.raises(InvalidArgumentError, match="no kind of state"):
        manager.host_state_dict("weight")
    for ask in (
        lambda: manager.host_tensor(weight.grad),
        lambda: manager.host_state_dict("grad_buffers"),
    ):
        with pytest.raises(NotOnHostError, match=r"grad.*released without a copy.*keep_grads=True"):
            ask()
    manager.close()
    for ask in (manager.host_tensor, manager.host_state_dict, lambda _: manager.on_host(int)):
        with pytest.raises(ManagerClosedError):
            ask("weights")


def test_two_tensors_of_one_name_are_told_apart(trainer, monkeypatch):
    manager = make(trainer)
    first, second = trainer.main[:2]
    before = snapshot({"main": first, "main#2": second})
    inventory = manager._trainer.inventory

    def renamed():
        found = inventory()
        for group in found.groups:
            group.tensors[:] = [("main" if t is first or t is second else n, t) for n, t in group.tensors]
        return found

    manager.offload("main_weights")
    monkeypatch.setattr(manager._trainer, "inventory", renamed)
    state = manager.host_state_dict("main_weights")
    assert_same(before, snapshot({name: state[name] for name in before}))
    with pytest.raises(InvalidArgumentError, match="2 tensors are called 'main'"):
        manager.host_tensor("main")
    manager.onload()


def test_an_offload_that_failed_half_way_leaves_nothing_half_copied_to_look_at(trainer, monkeypatch):
    before = snapshot(trainer.tensors())
    manager = make(trainer, bucket_bytes=1)
    first = faults.inject("offload.release", lambda: RuntimeError("injected"), after=2)
    undoing = faults.inject("onload.reserve", lambda: MemoryError("no room to undo"))
    with first, undoing, pytest.raises(MegastowError):
        manager.offload("weights")
    views = on_device = 0
    for name, tensor in trainer.tensors(("weights",)).items():
        if tensor.untyped_storage().nbytes():
            on_device += 1
            with pytest.raises(NotOnHostError, match="on the cpu device"):
                manager.host_tensor(tensor)
        else:
            views += 1
            assert torch.equal(raw(manager.host_tensor(tensor)), before[name])
    assert views
    assert on_device
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


def test_views_wait_for_a_move_in_the_background(trainer):
    weight = trainer.model.layers[0].weight
    before = raw(weight)
    manager = make(trainer)
    handle = manager.offload(non_blocking=True)
    assert torch.equal(before, raw(manager.host_tensor(weight)))
    handle.wait()
    manager.onload(non_blocking=True)
    with pytest.raises(NotOnHostError):
        manager.host_tensor(weight)


# --- read-only -------------------------------------------------------------------------------------------------------


WRITES = {
    "mul_": lambda view, other: view.mul_(2),
    "copy_": lambda view, other: view.copy_(other),
    "item": lambda view, other: view.__setitem__(0, 1.0),
    "slice": lambda view, other: view[2:4].zero_(),
    "flat": lambda view, other: view.view(-1).zero_(),
    "other dtype": lambda view, other: view.view(torch.int16).zero_(),
    "unbound": lambda view, other: view.unbind()[1].zero_(),
    "detached": lambda view, other: view.detach().zero_(),
    "data": lambda view, other: view.data.zero_(),
    "same device": lambda view, other: view.cpu().contiguous().zero_(),
    "out": lambda view, other: torch.add(other, 1, out=view),
    "foreach": lambda view, other: torch._foreach_add_([view], 1),
    "init": lambda view, other: torch.nn.init.normal_(view),
    "parameter": lambda view, other: torch.nn.Parameter(view).data.zero_(),
    "set_": lambda view, other: other.clone().set_(view),
    "resize": lambda view, other: view.resize_(1),
    "apply": lambda view, other: view.apply_(lambda x: 0.0),
    "dlpack": lambda view, other: torch.from_dlpack(view),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_what_would_write_to_a_view_is_refused_and_writes_nothing(write, inference):
    trainer = Trainer()
    before = raw(trainer.model.layers[0].weight)
    manager = create_memory_manager(trainer.model)
    with manager.offloaded():
        view = manager.host_tensor("layers.0.weight")
        with torch.inference_mode(inference), pytest.raises(ReadOnlyError, match="Nothing was written"):
            write(view, torch.zeros(16, 16, dtype=torch.bfloat16))
        assert torch.equal(before, raw(view))
    assert torch.equal(before, raw(trainer.model.layers[0].weight))


def test_a_view_can_be_read_saved_copied_from_and_computed_with(trainer):
    manager = make(trainer)
    weight = trainer.model.layers[0].weight
    before, printed = raw(weight), str(weight.detach())
    doubled = raw(weight * 2)
    with manager.offloaded():
        view = manager.host_tensor(weight)
        fresh = torch.nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
        fresh.load_state_dict({"weight": view})
        with torch.inference_mode():  # as rollout engines run
            inside = torch.empty(16, 16, dtype=torch.bfloat16).copy_(view)
            assert torch.equal(raw(view * 2), doubled)
        file = io.BytesIO()
        torch.save([view, view[3]], file)
        file.seek(0)
        saved, row = torch.load(file)
        assert torch.equal(raw(row), raw(view[3]))
        copies = [view.clone(), copy.deepcopy(view), pickle.loads(pickle.dumps(view)), inside, saved]
        for each in (*copies, fresh.weight):
            assert torch.equal(before, raw(each))
        for each in copies:
            assert type(each) is torch.Tensor
            with torch.inference_mode():
                each.zero_()
        assert torch.equal(before, raw(view))
        assert str(view).split() == printed.replace("tensor(", "ReadOnlyTensor(").split()
        assert f"{view[0, 0]:.3f}" == f"{view.tolist()[0][0]:.3f}"
        torch.nn.functional.linear(torch.ones(1, 16, dtype=torch.bfloat16, requires_grad=True), view).sum().backward()
        array = manager.host_tensor("frozen").view(torch.int32).numpy()
        assert array.tobytes() == raw(manager.host_tensor("frozen")).numpy().tobytes()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert torch.equal(before, raw(weight))


# --- lifetime --------------------------------------------------------------------------------------------------------


def test_a_view_shows_the_same_bytes_for_as_long_as_it_lives(trainer):
    manager = make(trainer)
    manager.offload()
    views = {n: manager.host_tensor(t) for n, t in moved(trainer.tensors(KEPT)).items()}
    expected = snapshot(views)
    manager.onload()
    for _ in range(2):
        trainer.step()
        manager.offload()  # other bytes than before
        assert_same(expected, snapshot(views))
        manager.onload()
    manager.close()
    del manager, trainer
    gc.collect()
    blocks = junk([4096] * 64)
    assert_same(expected, snapshot(views))
    del blocks


def test_what_a_living_view_shows_is_not_what_comes_back_later(trainer):
    """The offload after it has memory of its own, and brings back what was trained meanwhile."""
    manager = make(trainer)
    manager.offload()
    view = manager.host_tensor("layers.0.weight")
    manager.onload()
    trainer.step()
    before = snapshot(trainer.tensors(KEPT))
    with manager.offloaded():
        assert not torch.equal(raw(view), raw(manager.host_tensor("layers.0.weight")))
    assert_same(before, snapshot(trainer.tensors(KEPT)))


@pytest.mark.parametrize("keep", ["view", "slice of it", "array"])
def test_host_memory_is_replaced_only_while_something_looks_at_it(trainer, keep):
    def address():
        return manager.host_tensor("layers.0.weight").data_ptr()

    manager = make(trainer)
    manager.offload()
    held, first = manager.host_bytes, address()
    view = manager.host_tensor("layers.0.weight").view(torch.int16)
    looking = {"view": view, "slice of it": view[1:2], "array": view.numpy()}[keep]
    del view
    manager.onload()
    plan = manager.plan("weights")
    assert plan.new_host_bytes > 0
    manager.offload()
    assert address() != first
    assert manager.host_bytes == held
    second = address()
    del looking
    for _ in range(3):
        manager.onload()
        assert manager.plan().new_host_bytes == 0
        manager.offload()
        assert address() == second
        assert manager.host_bytes == held
    manager.onload()


def test_a_view_that_is_sent_to_another_process_takes_nothing_with_it(trainer):
    """torch moves the storage of what it sends into shared memory."""
    before = snapshot(trainer.tensors(KEPT))
    manager = make(trainer)
    manager.offload()
    view = manager.host_tensor("layers.0.weight")
    there = ForkingPickler.loads(ForkingPickler.dumps(view))
    assert torch.equal(raw(there), raw(view))
    with torch.inference_mode():
        there.zero_()
    assert not raw(view).any()  # of the memory that both share now
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KEPT)))


def test_a_forked_child_reads_views_and_nothing_else():
    """Writers of checkpoints fork. In a process of its own: without care the child crashes."""
    run_python("""
import mmap, os, sys
import torch
from core_toys import Trainer, raw
from megastow import create_memory_manager

def flags(address):
    for line in open("/proc/self/smaps"):
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            found = start <= address < end
        elif head == "VmFlags:" and found:
            return line.split()[1:]
    return None

torch.set_num_threads(1)
trainer = Trainer(width=64)
trainer.step()
manager = create_memory_manager(trainer.model, trainer.optimizer)
weight, moment = trainer.model.layers[0].weight, trainer.optimizer.state[trainer.main[0]]["exp_avg"]
expected = raw(weight)
manager.offload()
view = manager.host_tensor(weight)
other = manager.host_tensor(moment).data_ptr()
for _ in range(2):
    child = os.fork()
    if not child:
        os._exit(10 + bool(torch.equal(raw(view), expected)) if flags(other) is None else 99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
    assert "dc" in flags(view.data_ptr()), flags(view.data_ptr())  # kept from children between two forks
address = view.data_ptr()
del view
child = os.fork()
if not child:
    os._exit(10 + (flags(address) is None))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
manager.onload()
assert torch.equal(raw(weight), expected)
""")


def test_views_in_many_hands_are_counted_right(trainer):
    """Threads that take and drop views while others do: the count of what is lent must not suffer."""
    manager = make(trainer)
    manager.offload()
    names = list(manager.host_state_dict("weights"))
    pool = multiprocessing.pool.ThreadPool(4)
    expected = snapshot(manager.host_state_dict("weights"))

    def look(number):
        name = names[number % len(names)]
        return torch.equal(raw(manager.host_tensor(name)), expected[name])

    assert all(pool.map(look, range(200)))
    pool.terminate()
    manager.onload()
    gc.collect()
    assert manager.plan().new_host_bytes == 0
