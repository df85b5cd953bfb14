"""`explain_residue` and strict offloads: planted leaks are found by name, and nothing is touched, run or kept alive."""

import collections
import functools
import gc
import itertools
import json
import pickle
import sys
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from core_toys import KINDS, Trainer, assert_same, live_bytes, moved, places, snapshot, storages

from megastow import (
    InvalidArgumentError,
    InvalidTypeError,
    ManagerClosedError,
    MemoryFigures,
    Residency,
    ResidueError,
    TransferError,
    create_memory_manager,
    faults,
    referrers,
)
from megastow import (
    manager as manager_module,
)
from megastow.device import Block, CudaDevice, Segment
from megastow.residue import Home, Subject, _tally, beside_the_allocator
from megastow.state import StateKind, Workspace

NUMBER = 4099  # elements of what is planted; nothing else has so many
NBYTES = 4 * NUMBER


def leak():
    return torch.ones(NUMBER)


@pytest.fixture(autouse=True, scope="module")
def _young_heap():
    """What is older than these tests is not looked at: a search passes over the heap some ten times."""
    trainer = Trainer()
    trainer.step()
    create_memory_manager(trainer.model, trainer.optimizer).close()  # imports whatever it imports
    del trainer
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_plant_at_a_time():
    """A thread of the test before may still be about to end, with what that has planted."""
    deadline = time.monotonic() + 10
    while any(type(t) is torch.Tensor and t.numel() == NUMBER for t in gc.get_objects()):
        assert time.monotonic() < deadline, "the test before has left something planted"
        time.sleep(0.01)
        gc.collect()


@pytest.fixture
def manager(trainer):
    with create_memory_manager(trainer.model, trainer.optimizer, bucket_bytes=4096) as made:
        yield made


class Holder:
    """Somebody's object."""


class Slots:
    __slots__ = ("empty", "old_copy")


class Cache(dict):
    """Somebody's dictionary."""


def planted(residue):
    """The storages that a test has planted, garbage included."""
    return [s for s in (*residue.storages, *residue.garbage) if s.nbytes == NBYTES]


def named(residue):
    """Kind and path of whoever holds what was planted, without the local variables of the test itself."""
    (storage,) = planted(residue)
    return {(owner.kind, owner.path) for owner in storage.owners}


# --- leaks that are found --------------------------------------------------------------------------------------------


def in_a_module(keep, monkeypatch):
    module = types.ModuleType("my_module")
    module.cache = {"x": leak()}
    monkeypatch.setitem(sys.modules, "my_module", module)
    return ("global", "my_module.cache['x']")


def in_a_nested_structure(keep, monkeypatch):
    module = types.ModuleType("my_module")
    module.cache = {3: (None, collections.deque([leak()]))}
    monkeypatch.setitem(sys.modules, "my_module", module)
    return ("global", "my_module.cache[3][1][0]")


def in_an_attribute(keep, monkeypatch):
    holder = keep.holder = Holder()
    holder.old_copy = [None, leak()]
    return ("local", "keep > Holder.holder > Holder.old_copy[1]")


def in_a_slot(keep, monkeypatch):
    holder = keep.holder = Slots()
    holder.old_copy = leak()
    return ("local", "keep > Holder.holder > Slots.old_copy")


def in_a_class(keep, monkeypatch):
    class Mine:
        table = leak()

    keep.mine = Mine
    return ("class", f"{__name__}.in_a_class.<locals>.Mine.table")


def in_a_subclass_of_dict(keep, monkeypatch):
    cache = keep.cache = Cache()
    cache["x"] = 1
    cache.last = leak()
    return ("local", "keep > Holder.cache > Cache.last")


def as_a_key(keep, monkeypatch):
    keep.cache = {leak(): 1}
    return ("local", "keep > Holder.cache.keys()")


def in_a_closure(keep, monkeypatch):
    seen = [{"view": leak()[1:]}]

    def inner():
        return seen

    keep.inner = inner
    return ("closure", "seen[0]['view']")


def in_a_default(keep, monkeypatch):
    def inner(x=leak()):  # noqa: B008
        return x

    keep.inner = inner
    return ("function", "in_a_default.<locals>.inner.__defaults__[0]")


def in_a_partial(keep, monkeypatch):
    keep.call = functools.partial(print, leak())
    return ("local", "keep > Holder.call > partial.args[0]")


def in_a_generator(keep, monkeypatch):
    def make():
        batch = leak()
        yield batch.shape
        yield batch

    generator = keep.generator = make()
    next(generator)
    return ("local", "batch")


def in_a_traceback(keep, monkeypatch):
    def fail():
        activation = leak()
        raise LookupError(str(activation.shape))

    try:
        fail()
    except LookupError as error:
        keep.error = error
    return ("local", "activation")


def as_a_gradient(keep, monkeypatch):
    parameter = keep.parameter = torch.nn.Parameter(torch.ones(1).expand(NUMBER))
    parameter.grad = leak()
    return ("local", "keep > Holder.parameter > Parameter.grad")


def as_an_attribute_of_a_tensor(keep, monkeypatch):
    tensor = keep.tensor = torch.ones(1)
    tensor.main_copy = leak()
    return ("local", "keep > Holder.tensor > Tensor.main_copy")


def as_a_storage(keep, monkeypatch):
    keep.kept = [leak().untyped_storage()]
    return ("local", "keep > Holder.kept[0]")


def in_a_living_cycle(keep, monkeypatch):
    one, other = Holder(), Holder()
    one.other, other.one, other.payload = other, one, leak()
    keep.one = one
    return ("local", "keep > Holder.one > Holder.other > Holder.payload")


def in_garbage(keep, monkeypatch):
    node = Holder()
    node.me = node
    node.payload = [leak()]
    return ("garbage", "Holder.payload[0]")


def as_a_gradient_in_garbage(keep, monkeypatch):
    node = Holder()
    node.me = node
    node.weight = torch.ones(1).expand(NUMBER).requires_grad_()
    node.weight.grad = leak()
    return ("garbage", "Holder.weight > Tensor.grad")


def in_an_autograd_graph(keep, monkeypatch):
    square = torch.ones(NUMBER)
    weight = torch.ones(1, requires_grad=True)
    keep.loss = (weight * square).sum()
    return ("unseen", "")


PLANTS = [
    in_a_module,
    in_a_nested_structure,
    in_an_attribute,
    in_a_slot,
    in_a_class,
    in_a_subclass_of_dict,
    as_a_key,
    in_a_closure,
    in_a_default,
    in_a_partial,
    in_a_generator,
    in_a_traceback,
    as_a_gradient,
    as_an_attribute_of_a_tensor,
    as_a_storage,
    in_a_living_cycle,
    in_garbage,
    as_a_gradient_in_garbage,
    in_an_autograd_graph,
]


@pytest.fixture
def no_collection():
    """Garbage stays until somebody asks for a collection."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_leak_is_found_by_name(trainer, manager, plant, monkeypatch, no_collection):
    manager.offload()
    assert not planted(manager.explain_residue())
    keep = Holder()
    expected = plant(keep, monkeypatch)
    residue = manager.explain_residue()
    monkeypatch.undo()
    del keep
    assert expected in named(residue), named(residue)
    assert bool(residue.garbage) == (expected[0] == "garbage")
    gc.collect()
    assert not planted(manager.explain_residue()), "it is named although it is gone, or asking has kept it alive"


def test_a_local_variable_is_found_with_its_function_in_every_thread(manager):
    manager.offload()
    held, done = threading.Event(), threading.Event()

    def rollout():
        stale = [leak()]
        held.set()
        done.wait(60)
        del stale

    thread = threading.Thread(target=rollout)
    thread.start()
    try:
        assert held.wait(60)
        (storage,) = planted(manager.explain_residue())
    finally:
        done.set()
        thread.join()
    (owner,) = storage.owners
    assert (owner.kind, owner.path) == ("local", "stale[0]")
    assert "rollout" in owner.place
    assert "test_residue.py:" in owner.place


def test_what_is_in_a_deep_model_is_found_from_the_outside(manager):
    outer = torch.nn.Linear(1, NUMBER, bias=False)
    for _ in range(8):
        outer = torch.nn.Sequential(outer)
    manager.offload()
    (storage,) = planted(manager.explain_residue())
    assert [owner.path.split(" > ")[0] for owner in storage.owners] == ["outer"]
    assert storage.owners[0].path.endswith("Linear._parameters['weight']")


def test_all_who_hold_it_are_named(manager):
    manager.offload()
    tensor = leak()
    mine, yours = [tensor], {"x": tensor[3:]}
    (storage,) = planted(manager.explain_residue())
    assert {owner.path for owner in storage.owners} >= {"tensor", "mine[0]", "yours['x']"}
    assert len(storage.tensors) == 2
    del mine, yours


def test_garbage_is_collected_and_told(manager, no_collection):
    manager.offload()
    finalized = []

    class Node:
        def __del__(self):
            finalized.append(1)

    node = Node()
    node.me, node.payload = node, leak()
    before = live_bytes_uncollected()
    del node
    residue = manager.explain_residue()
    assert finalized == [1]
    assert [s.is_garbage for s in planted(residue)] == [True]
    assert before - live_bytes_uncollected() == NBYTES
    assert not gc.garbage
    assert not gc.get_debug()
    assert "garbage in reference cycles" in str(residue)


def live_bytes_uncollected():
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            found[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return sum(found.values())


# --- and nothing else ------------------------------------------------------------------------------------------------


def test_nothing_is_reported_where_nothing_is_left():
    gc.collect()
    gc.freeze()  # what other tests have left
    trainer = Trainer()
    trainer.step()
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    manager.offload()
    residue = manager.explain_residue()
    holders = {owner.path.rsplit(".", 1)[-1] for storage in residue.storages for owner in storage.owners}
    assert holders == {"state[<Tensor>]['step']"}, residue  # torch keeps these on the host, which is the device here
    assert not residue.garbage
    assert not residue.resident
    assert residue.residue_bytes == 4 * len(residue.storages)
    manager.onload()
    manager.offload(max_residue_bytes=residue.residue_bytes)


def test_the_whole_heap_is_looked_at(manager):
    gc.unfreeze()
    manager.offload()
    Holder.table = leak()
    test_the_whole_heap_is_looked_at.kept = [Holder.table]
    try:
        residue = manager.explain_residue()
    finally:
        del Holder.table, test_the_whole_heap_is_looked_at.kept
        gc.freeze()
    assert named(residue) == {
        ("class", f"{__name__}.Holder.table"),
        ("function", "test_the_whole_heap_is_looked_at.kept[0]"),
    }


@pytest.mark.parametrize("kinds", [c for n in range(1, 4) for c in itertools.combinations(KINDS, n)], ids="+".join)
def test_kinds_that_are_here_are_no_residue(trainer, manager, kinds):
    manager.offload(*kinds)
    residue = manager.explain_residue()
    here = {kind: moved(trainer.tensors([kind])) for kind in KINDS if kind not in kinds}
    assert {str(kind): nbytes for kind, nbytes in residue.resident.items()} == {
        kind: sum(storages(tensors).values()) for kind, tensors in here.items()
    }
    shapes = {tuple(t.shape) for tensors in here.values() for t in tensors.values() if t.numel() > 256}
    assert not shapes & {t.shape for s in residue.storages for t in s.tensors}


def test_what_a_kind_has_got_while_it_was_away_is_residue(trainer, manager):
    manager.offload()
    trainer.model.norm.weight.grad = None
    grad = torch.ones(1, dtype=torch.bfloat16).expand(16).clone()
    trainer.model.norm.weight.grad = grad
    del grad
    residue = manager.explain_residue()
    assert any(o.path.endswith("Parameter.grad") for s in residue.storages for t in s.tensors for o in t.owners)


def test_asking_changes_nothing(trainer, manager):
    twin = Trainer()
    twin.step()
    twin.step()
    other = create_memory_manager(twin.model, twin.optimizer, bucket_bytes=4096)
    before, where = snapshot(trainer.tensors()), places(trainer.tensors())
    tensors = live_bytes()
    manager.explain_residue()
    assert live_bytes() == tensors
    assert places(trainer.tensors()) == where
    assert_same(before, snapshot(trainer.tensors()))
    report, undisturbed = manager.offload(keep_grads=True), other.offload(keep_grads=True)
    assert manager.host_bytes == other.host_bytes, "it packs otherwise, because somebody else holds its storages"
    assert report.device_bytes == undisturbed.device_bytes
    manager.explain_residue()
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    other.close()


def test_nothing_is_kept_alive(manager, no_collection):
    manager.offload()
    tensor = leak()
    box = {"x": tensor}
    reference = weakref.ref(tensor)
    (storage,) = planted(manager.explain_residue())
    assert {"tensor", "box['x']"} <= {owner.path for owner in storage.owners}
    del tensor, box
    assert reference() is None


def test_the_dictionary_that_locals_gives_is_left_alone(manager):
    tensor = leak()
    mine = locals()
    manager.explain_residue()
    assert mine["tensor"] is tensor


def test_a_debugger_s_variables_are_left_alone(manager):
    def traced():
        tensor = leak()
        number = 1  # the tracer asks here
        return tensor, number

    def trace(frame, event, _):
        if event == "line":
            manager.explain_residue(most_storages=1)
        return trace

    outer = sys.gettrace()
    sys.settrace(lambda frame, event, arg: trace if frame.f_code is traced.__code__ else None)
    try:
        tensor, number = traced()
    finally:
        sys.settrace(outer)
    assert (tensor.numel(), number) == (NUMBER, 1)


def test_no_code_of_others_runs(manager):
    def never(*_, **__):
        ran.append(sys._getframe().f_back.f_code.co_name)
        raise KeyboardInterrupt

    ran = []

    class Meta(type):
        __getattribute__ = __hash__ = __eq__ = __instancecheck__ = __subclasscheck__ = __repr__ = never

    class Hostile(metaclass=Meta):
        __getattribute__ = __getattr__ = __repr__ = __str__ = __hash__ = __eq__ = __bool__ = __len__ = never
        __dict__ = __class__ = property(never)

    class HostileDict(dict):
        __getitem__ = __iter__ = items = keys = values = __len__ = __repr__ = __eq__ = __getattribute__ = never

    class HostileList(list):
        __getitem__ = __iter__ = __len__ = __repr__ = __eq__ = __getattribute__ = never

    class HostileTensor(torch.Tensor):
        __torch_function__ = classmethod(never)
        __repr__ = never

    class HostileKey(str):
        __slots__ = ()
        __repr__ = __str__ = never

    manager.offload()
    proxied = Holder()
    dead = weakref.proxy(proxied)
    del proxied
    hostile = object.__new__(Hostile)
    inner = HostileDict()
    dict.__setitem__(inner, HostileKey("k"), leak())
    type.__setattr__(Hostile, "table", HostileList([inner]))
    del inner
    subclass = torch.ones(7001).as_subclass(HostileTensor)
    residue = manager.explain_residue()
    assert not ran
    (storage,) = planted(residue)
    here = "test_no_code_of_others_runs.<locals>"
    path = f"{__name__}.{here}.Hostile.table > {here}.HostileList[0] > {here}.HostileDict[<{here}.HostileKey>]"
    assert [(owner.kind, owner.path) for owner in storage.owners] == [("class", path)]
    assert any(t.type.endswith("HostileTensor") for s in residue.storages for t in s.tensors)
    del dead, hostile, subclass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_told_by_its_elements(manager):
    gc.collect()
    kept = torch.nested.nested_tensor([torch.ones(4000), torch.ones(NUMBER - 4000)], layout=torch.strided)
    manager.offload()
    (storage,) = planted(manager.explain_residue())
    assert [(t.shape, [o.path for o in t.owners]) for t in storage.tensors] == [((NUMBER,), ["kept"])]
    del kept


def test_a_wrapper_around_tensors_has_no_memory_of_its_own(manager):
    gc.collect()
    nested = torch.nested.nested_tensor([leak(), torch.ones(3)], layout=torch.jagged)
    sparse = torch.ones(3, 3).to_sparse()
    meta = torch.ones(NUMBER, device="meta")
    manager.offload()
    residue = manager.explain_residue()
    assert not any(t.type == "NestedTensor" for s in residue.storages for t in s.tensors)
    assert not planted(residue)
    del nested, sparse, meta


def test_nothing_is_looked_at_unless_somebody_asks(trainer, manager, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the heap was looked at")

    for name in ("get_objects", "get_referrers", "get_referents", "collect"):
        monkeypatch.setattr(gc, name, never)
    before = snapshot(trainer.tensors())
    manager.offload(keep_grads=True)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    with pytest.raises(AssertionError, match="looked at"):
        manager.explain_residue()


def test_a_move_in_the_background_is_waited_for(manager):
    go_on = threading.Event()
    with faults.meddle("offload.drop", lambda: go_on.wait(60)):
        handle = manager.offload(non_blocking=True)
        answers = []
        asking = threading.Thread(target=lambda: answers.append(manager.explain_residue()))
        asking.start()
        assert not answers
        go_on.set()
        asking.join(60)
        handle.wait(60)
    assert not answers[0].resident


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_s_own_objects_may_be_frozen(trainer, manager, monkeypatch, kind):
    """Where the collector does not show them, its memory is not that of strangers."""
    manager.offload(kind)
    here = storages(moved(trainer.tensors([k for k in KINDS if k != kind])))
    blocks = [Block(s.data_ptr(), s.nbytes()) for s in live_storages(trainer) if s._cdata in here and s.nbytes()]
    monkeypatch.setattr(manager._device, "segments", lambda: [Segment(0, 1 << 20, 1 << 20, False, tuple(blocks))])
    gc.freeze()
    residue = manager.explain_residue()
    assert not residue.unseen
    assert not residue.idle_bytes
    assert sum(residue.resident.values()) == sum(here.values())
    assert any("frozen" in note for note in residue.notes)


def live_storages(trainer):
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in trainer.tensors().values()}.values()


# --- strict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kinds", [c for n in range(1, 5) for c in itertools.combinations(KINDS, n)], ids="+".join)
def test_a_strict_offload_fails_restored_and_passes_when_the_leak_is_gone(trainer, manager, kinds, background):
    def offload(most):
        found = manager.offload(*kinds, max_residue_bytes=most, non_blocking=background)
        return found.wait(60) if background else found

    before = snapshot(trainer.tensors())
    with pytest.raises(ResidueError) as raised:
        offload(0)  # there is always something on the CPU
    floor = raised.value.residue.residue_bytes
    stale = Holder()
    stale.old_copy = leak()
    for _ in range(2):
        with pytest.raises(ResidueError, match=r"Holder\.old_copy") as raised:
            offload(floor + NBYTES - 1)
        assert isinstance(raised.value, TransferError)
        assert raised.value.max_residue_bytes == floor + NBYTES - 1
        assert ("local", "stale > Holder.old_copy") in named(raised.value.residue)
        assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
        assert_same(before, snapshot(trainer.tensors()))
    trainer.model(torch.zeros(1, dtype=torch.long))
    del stale.old_copy
    offload(floor)
    assert {kind for kind in KINDS if manager.residency(kind) is Residency.OFFLOADED} == set(kinds)
    assert manager.explain_residue().residue_bytes == floor, "what was about to go was not counted in"
    assert sum(storages(moved(trainer.tensors(kinds))).values()) == 0
    manager.onload()
    assert_same(
        {n: b for n, b in before.items() if not n.startswith("grad") or "grad_buffers" not in kinds},
        snapshot(trainer.tensors([k for k in KINDS if k != "grad_buffers" or k not in kinds])),
    )


@pytest.mark.parametrize("options", [{"verify": "digest"}, {"host_memory": "disk"}], ids=str)
def test_a_strict_offload_is_undone_whatever_it_went_to(trainer, tmp_path, options):
    before = snapshot(trainer.tensors())
    where = {"disk_folder": tmp_path} if "host_memory" in options else {}
    with create_memory_manager(trainer.model, trainer.optimizer, bucket_bytes=4096, **options, **where) as manager:
        with pytest.raises(ResidueError):
            manager.offload(max_residue_bytes=0)
        assert_same(before, snapshot(trainer.tensors()))
        manager.offload(strict=True)


def test_a_strict_block_is_not_entered_if_too_much_stays(trainer, manager):
    before = snapshot(trainer.tensors())
    with pytest.raises(ResidueError), manager.offloaded(max_residue_bytes=0):
        pytest.fail("the block was entered")
    assert_same(before, snapshot(trainer.tensors()))
    with manager.offloaded("weights", strict=True):
        assert manager.residency("weights") is Residency.OFFLOADED
    assert_same(before, snapshot(trainer.tensors()))


def test_an_error_that_is_kept_keeps_no_memory(trainer, manager):
    with pytest.raises(ResidueError) as raised:
        manager.offload(max_residue_bytes=0, non_blocking=True).wait(60)
    gone = weakref.ref(trainer.model.frozen)
    storage = torch.multiprocessing.reductions.StorageWeakRef(trainer.model.frozen.untyped_storage())
    trainer.model.frozen = None
    assert gone() is None
    assert storage.expired()
    del raised


def test_a_trainer_goes_on_after_a_strict_offload_that_failed():
    trainer, twin = Trainer(), Trainer()
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    for _ in range(3):
        loss = trainer.backward(trainer.forward())
        with pytest.raises(ResidueError):
            manager.offload(max_residue_bytes=0)
        trainer.update()
        assert torch.equal(loss, twin.step())
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))
    manager.close()


def test_strict_alone_allows_for_what_libraries_keep(manager):
    manager.offload(strict=True)
    manager.onload()
    big = torch.empty(70 << 20, dtype=torch.uint8)
    with pytest.raises(ResidueError) as raised:
        manager.offload(strict=True)
    assert raised.value.max_residue_bytes == 64 << 20
    del big
    manager.offload(strict=True)


def test_garbage_does_not_make_a_strict_offload_fail(manager, no_collection):
    with pytest.raises(ResidueError) as raised:
        manager.offload(max_residue_bytes=0)
    floor = raised.value.residue.residue_bytes
    del raised
    in_garbage(None, None)
    manager.offload(max_residue_bytes=floor)


def test_a_strict_offload_of_what_is_away_looks_as_well(manager):
    manager.offload()
    with pytest.raises(ResidueError):
        manager.offload(max_residue_bytes=0)
    assert manager.residency("weights") is Residency.OFFLOADED
    assert not manager.offload(strict=True).kinds["weights"].moved


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_goes_wrong_while_looking_undoes_the_offload(trainer, manager, monkeypatch, error):
    def fails(_subject):
        raise error("injected")

    before = snapshot(trainer.tensors())
    monkeypatch.setattr(manager_module, "measure", fails)
    with pytest.raises(TransferError if error is RuntimeError else error, match="injected"):
        manager.offload(strict=True)
    assert_same(before, snapshot(trainer.tensors()))
    monkeypatch.undo()
    manager.offload(strict=True)


def test_an_impossible_number_is_refused_before_anything_moves(trainer, manager):
    where = places(trainer.tensors())
    with pytest.raises(InvalidArgumentError, match="max_residue_bytes is -1"):
        manager.offload(max_residue_bytes=-1)
    with pytest.raises(InvalidTypeError, match="max_residue_bytes is a str"):
        manager.offload(max_residue_bytes="64M")
    with pytest.raises(InvalidArgumentError, match="most_storages is -1"):
        manager.explain_residue(most_storages=-1)
    assert places(trainer.tensors()) == where


def test_a_closed_manager_explains_nothing(trainer):
    manager = create_memory_manager(trainer.model)
    manager.close()
    with pytest.raises(ManagerClosedError):
        manager.explain_residue()


# --- what is told, and the allocator's side --------------------------------------------------------------------------


def test_it_prints_and_goes_into_json(manager):
    manager.offload("weights")
    held = [leak()]
    residue = manager.explain_residue()
    lines = str(residue).splitlines()
    assert "main_weights" in lines[0]
    assert f"Tensor float32 [{NUMBER}]: held[0] (local of" in str(residue)
    told = json.loads(json.dumps(residue.as_dict()))
    (storage,) = (s for s in told["storages"] if s["nbytes"] == NBYTES)
    assert storage["tensors"][0]["shape"] == [NUMBER]
    assert storage["tensors"][0]["owners"][0]["path"] == "held[0]"
    assert told["residue_bytes"] == residue.residue_bytes
    assert told["resident"].keys() == set(KINDS) - {"weights"}
    del held


def test_owners_are_looked_for_as_far_as_asked(manager):
    manager.offload()
    big, small = torch.ones(1 << 20), leak()
    residue = manager.explain_residue(most_storages=1)
    assert residue.storages[0].owners[0].path == "big"
    assert planted(residue)[0].owners == ()
    assert "owners not looked for" in str(planted(residue)[0])
    del big, small


def test_a_search_that_takes_too_long_claims_nothing(manager, monkeypatch):
    manager.offload()
    held = [leak()]
    monkeypatch.setattr(referrers, "MOST_SECONDS", -1.0)
    (storage,) = planted(manager.explain_residue())
    assert storage.owners == ()
    assert "owners not looked for" in str(storage)
    del held


def test_workspaces_are_named(manager, monkeypatch):
    buffer = {"mpu": leak()}
    kept = Workspace("the global buffer", lambda: list(buffer.values()), buffer.clear)
    monkeypatch.setattr(type(manager._trainer), "workspaces", lambda self: [kept])
    manager.offload()
    (storage,) = planted(manager.explain_residue())
    assert storage.workspace == "the global buffer"
    assert "the global buffer" in str(storage)


def test_segments_are_told_with_what_holds_them_open(trainer, manager, monkeypatch):
    manager.offload("optimizer_states")
    held, away = leak(), trainer.optimizer.state[trainer.main[0]]["exp_avg"]
    weight = trainer.model.layers[0].weight
    assert away.untyped_storage().nbytes() == 0
    mine = Block(held.data_ptr(), NBYTES + 100)
    meant = Block(weight.untyped_storage().data_ptr(), weight.untyped_storage().nbytes())
    segments = [
        Segment(address, mib << 20, mib << 20, is_private, blocks)
        for address, mib, is_private, blocks in (
            (mine.address, 1, False, (mine,)),
            (meant.address, 2, False, (meant, Block(meant.address + 64, 16))),
            (0, 3, False, (Block(4096, 8 << 10),)),
            (0, 4, True, ()),
            (0, 5, False, ()),
            (meant.address, 6, False, (meant,)),
        )
    ]
    monkeypatch.setattr(manager._device, "segments", lambda: segments)
    monkeypatch.setattr(manager._device, "blas_workspace_bytes", lambda: 8 << 10)
    figures = MemoryFigures(1 << 20, 21 << 20, 30 << 20)
    monkeypatch.setattr(manager._device, "memory", lambda: figures)
    residue = manager.explain_residue()
    assert residue.unseen == (8 << 10, 16)
    assert [(s.nbytes >> 20, s.idle_bytes, s.is_private) for s in residue.segments] == [
        (1, (1 << 20) - NBYTES, False),
        (2, 0, False),
        (3, (3 << 20) - (8 << 10), False),
        (4, 4 << 20, True),
    ]
    assert "held (local of" in residue.segments[0].held_by[0]
    assert residue.residue_bytes == residue.storage_bytes + 16 + (8 << 20) - NBYTES
    assert any("1 of the unseen blocks" in note for note in residue.notes)
    monkeypatch.setattr(manager._device, "segments", lambda: None)
    rest = manager.explain_residue()
    known = rest.storage_bytes + sum(rest.resident.values())
    assert rest.unseen_bytes == max(0, (1 << 20) - known) > 0
    assert "beside torch's allocator" in str(rest)


def test_a_snapshot_of_the_cuda_allocator_is_read(monkeypatch):
    blocks = [
        {"size": 512, "state": "active_allocated"},
        {"size": 1024, "state": "inactive"},
        {"size": 2048, "state": "active_awaiting_free"},
        {"size": 512, "state": "active_allocated"},
    ]
    segment = {"address": 1000, "total_size": 4096, "segment_pool_id": (0, 0), "is_expandable": False, "blocks": blocks}
    found = [{**segment, "device": 0}, {**segment, "device": 1, "segment_pool_id": (0, 7)}]
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": found})
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = CudaDevice.__new__(CudaDevice)
    device.torch_device = torch.device("cuda", 1)
    handed_out = (Block(1000, 512), Block(1000 + 512 + 1024 + 2048, 512))
    assert device.segments() == [Segment(1000, 4096, 4096, True, handed_out)]
    assert device.blas_workspace_bytes() == 32 << 20
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    assert device.blas_workspace_bytes() == (8 << 20) + (128 << 10)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert device.segments() is None


SMALL, LARGE, SETTING = 2 << 20, 20 << 20, "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(
    ("kind", "last", "in_the_environment", "page"),
    [
        ("large", "expandable_segments:True", "", LARGE),
        ("large", "expandable_segments:True,large_segment_size_mb:64", "", 64 << 20),
        ("large", "large_segment_size_mb:32, large_segment_size_mb : 6 4", "", 64 << 20),  # so torch reads it
        ("large", "expandable_segments:True", "large_segment_size_mb:64", 64 << 20),  # switched on later
        ("large", "large_segment_size_mb:1", "large_segment_size_mb:+48", 48 << 20),  # torch refused the last
        ("large", None, "", LARGE),
        ("small", "expandable_segments:True,large_segment_size_mb:64", "", SMALL),
        ("private", "expandable_segments:True,large_segment_size_mb:64", "", 100 << 20),
        ("ordinary", "large_segment_size_mb:64", "", 100 << 20),
    ],
)
def test_the_pages_of_a_segment_are_those_that_torch_maps(monkeypatch, kind, last, in_the_environment, page):
    segment = {
        "device": 0,
        "address": 4096,
        "total_size": 100 << 20,
        "segment_type": "small" if kind == "small" else "large",
        "segment_pool_id": (0, 7) if kind == "private" else (0, 0),
        "is_expandable": kind != "ordinary",
        "blocks": [],
    }
    settings = {} if last is None else {"allocator_settings": {SETTING: last}}
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv(SETTING, in_the_environment)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": [segment], **settings})
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    device = CudaDevice.__new__(CudaDevice)
    device.torch_device = torch.device("cuda", 0)
    assert device.segments() == [Segment(4096, 100 << 20, page, kind == "private", ())]


def test_a_page_is_held_open_by_what_stays_and_not_by_what_goes():
    """Gradients are about to go when a strict offload looks: they hold nothing, however many pages they lie in."""
    page, start = 4096, 1 << 40
    nbytes = 12 * page + 100
    grads, tensor, weight, last = 1, 2, 3, 4
    homes = {
        grads: Home(start, 3 * page + 8),
        tensor: Home(start + 3 * page + 8, page - 100),
        weight: Home(start + 9 * page + 64, 64),
        last: Home(start + 12 * page, 50),
    }
    blocks = (
        Block(start, 3 * page + 8),
        Block(start + 3 * page + 8, page),  # in two pages, one of which gradients are in
        Block(start + 8 * page - 16, page + 32),  # without a tensor, in three pages, one of which the weight is in
        Block(start + 9 * page + 64, 64),
        Block(start + 12 * page, 64),  # in what there is of the last page
    )
    for page_bytes, expected in ((page, (5 * page + 100, 2 * page + 134)), (nbytes, (nbytes, 0))):
        segment = Segment(start, nbytes, page_bytes, False, blocks)
        device = types.SimpleNamespace(segments=lambda segment=segment: [segment])
        tally = _tally(Subject(device, {weight: (StateKind.WEIGHTS, homes[weight])}, {grads: homes[grads]}), homes, {})
        assert tally.unseen == (page + 32,)
        assert [(each.nbytes, each.idle_bytes) for each in tally.segments] == [expected]


def test_what_the_driver_has_given_beside_the_allocator_is_told_by_moments():
    moments = {"context": MemoryFigures(0, 0, 500), "first collective": MemoryFigures(5, 10, 810)}
    assert beside_the_allocator(MemoryFigures(50, 100, 1000), moments) == {
        "context": 500,
        "first collective": 300,
        "since": 100,
    }
    assert beside_the_allocator(MemoryFigures(None, None, 7), {"context": MemoryFigures(None, None, 5)}) == {}


def test_what_a_manager_refers_to_is_named_by_whoever_has_it(trainer, manager):
    trainer.model.layers[0].cache = [leak()]
    manager.offload()
    assert named(manager.explain_residue()) == {
        ("local", "trainer > Trainer.model > Net._modules['layers'] > ModuleList._modules['0'] > Linear.cache[0]")
    }


# --- whatever the heap is like, and whoever runs meanwhile -----------------------------------------------------------


def test_many_tensors_do_not_use_up_what_a_search_may_meet(manager, monkeypatch):
    monkeypatch.setattr(referrers, "MOST_OBJECTS", 500)
    manager.offload()
    held = {"x": leak()}
    many = [torch.empty(0) for _ in range(600)]
    assert named(manager.explain_residue()) == {("local", "held['x']")}
    del held, many


def test_searches_of_several_managers_are_made_one_after_the_other(manager):
    other = Trainer(seed=1)
    other.step()
    holder = Holder()
    holder.a = {"b": leak()}
    heap = [[number] for number in range(50_000)]
    with create_memory_manager(other.model, other.optimizer) as second, ThreadPoolExecutor(2) as pool:
        manager.offload()
        second.offload()
        for _ in range(3):
            for found in pool.map(lambda asked: asked.explain_residue(), (manager, second)):
                (storage,) = planted(found)
                assert any("Holder" in owner.path or "holder" in owner.path for owner in storage.owners), storage
                assert not any("kept by megastow" in owner.place for owner in storage.owners), storage
            assert not gc.get_debug() & gc.DEBUG_SAVEALL
    del heap


@pytest.mark.parametrize("call", ["onload", "offload", "prepare", "close", "wait"])
@pytest.mark.parametrize("in_background", [False, True])
def test_a_finalizer_that_calls_the_manager_does_nothing_to_the_move_that_it_runs_in(
    trainer, manager, call, in_background, no_collection
):
    class Job:
        def __init__(self):
            self.me = self
            self.cache = torch.ones(1 << 20)  # without it there is little enough

        def __del__(self):
            try:
                getattr(manager, call)()
            except TransferError as error:
                said.append(str(error))
            else:
                said.append("went through")

    said = []
    before = snapshot(trainer.tensors(KINDS[:3]))
    with pytest.raises(ResidueError) as raised:
        manager.offload(max_residue_bytes=0)
    most = raised.value.residue.residue_bytes + (1 << 20)
    raised = None
    Job()
    moved = manager.offload(max_residue_bytes=most, non_blocking=in_background)
    if in_background:
        moved.wait(60)
    assert len(said) == 1
    if call != "wait" or in_background:
        assert "in the middle of a call" in said[0]
    assert {manager.residency(kind) for kind in KINDS} == {Residency.OFFLOADED}
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))
    assert all(grad.untyped_storage().nbytes() for grad in trainer.tensors(["grad_buffers"]).values())


def test_a_profiler_s_variables_are_left_alone(manager):
    """Its callbacks write back what they find, as those of a tracer do: in this thread, and in another that waits."""

    def step():
        batch = leak()
        return done(batch)

    def done(batch):
        return batch.numel()

    def asks(frame, event, _):
        if event == "call" and frame.f_code is done.__code__:
            manager.explain_residue(most_storages=1)

    outer = sys.getprofile()
    sys.setprofile(asks)
    try:
        assert step() == NUMBER
    finally:
        sys.setprofile(outer)

    waits, goes_on, found = threading.Event(), threading.Event(), []

    def waiting(frame, event, _):
        if event == "call" and frame.f_code is done.__code__:
            waits.set()
            goes_on.wait(30)

    def run():
        sys.setprofile(waiting)
        try:
            found.append(step())
        finally:
            sys.setprofile(None)

    thread = threading.Thread(target=run)
    thread.start()
    assert waits.wait(30)
    manager.explain_residue(most_storages=1)
    goes_on.set()
    thread.join()
    assert found == [NUMBER]


def test_what_changes_while_it_is_looked_at_is_no_error(manager):
    manager.offload()
    keep = Holder()
    keep.cache = dict.fromkeys(range(5000))
    keep.cache["x"] = leak()
    ends = threading.Event()

    class Adds:
        def __init__(self):
            self.me = self

        def __del__(self):
            keep.cache[object()] = None

    def churn():
        while not ends.is_set():
            for _ in range(50):
                Adds()
            time.sleep(0)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(3):
            assert ("local", "keep > Holder.cache['x']") in named(manager.explain_residue())
    finally:
        ends.set()
        thread.join()


def test_any_key_has_a_name(manager):
    manager.offload()
    held = {10**5000: leak()}
    assert named(manager.explain_residue()) == {("local", "held[<int>]")}
    del held


@pytest.mark.parametrize("base", [object, dict])
def test_variables_in_a_mapping_of_somebody_s_own(manager, base):
    class Names(base):
        def __init__(self):
            self.found = {}

        def __getitem__(self, key):
            return self.found[key]

        def __setitem__(self, key, value):
            self.found[key] = value

        def items(self):
            raise KeyboardInterrupt

    manager.offload()
    exec("tensor = leak(); ask()", {"leak": leak, "ask": manager.explain_residue}, Names())


def test_a_tensor_or_a_storage_of_any_class_is_told(manager):
    class Odd(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise KeyboardInterrupt

    class Meta(type(torch.UntypedStorage)):
        def __getattribute__(cls, name):
            raise LookupError(name)

    class OddStorage(torch.UntypedStorage, metaclass=Meta):
        @property
        def device(self):
            raise LookupError("device")

    manager.offload()
    odd = torch.Tensor._make_subclass(Odd, leak(), dispatch_sizes_strides_policy="sizes")
    storage = OddStorage(64)
    assert any(tensor.type.endswith("Odd") for tensor in planted(manager.explain_residue())[0].tensors)
    del odd, storage


def test_variables_of_suspended_and_of_running_functions(manager):
    def suspended():
        batch = leak()
        inner = lambda: batch  # noqa: E731
        yield inner

    async def running():
        batch = leak()
        return named(manager.explain_residue()), batch

    manager.offload()
    generator = suspended()
    next(generator)
    ((kind, path),) = named(manager.explain_residue())
    assert (kind, path) == ("local", "batch")
    generator.close()
    del generator
    with pytest.raises(StopIteration) as ended:
        running().send(None)
    assert ended.value.value[0] == {("local", "batch")}


def test_an_error_survives_the_way_to_another_process(manager):
    tensor = leak()
    with pytest.raises(ResidueError) as raised:
        manager.offload(max_residue_bytes=0)
    again = pickle.loads(pickle.dumps(raised.value))
    assert type(again) is ResidueError
    assert str(again) == str(raised.value)
    assert (again.residue, again.max_residue_bytes) == (raised.value.residue, 0)
    assert [storage.owners for storage in again.residue.storages] == [s.owners for s in raised.value.residue.storages]
    del tensor


def test_a_search_ends_in_time(manager, monkeypatch):
    monkeypatch.setattr(referrers, "MOST_SECONDS", 0.0)
    manager.offload()
    held = [leak()]
    (storage,) = planted(manager.explain_residue())
    assert str(storage).endswith("owners not looked for") or storage.owners
    del held
