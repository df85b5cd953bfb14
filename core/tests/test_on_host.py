"""State dicts that a trainer makes itself while its state is away, and all that a function may do on the way."""

import collections
import dataclasses
import io
import threading

import pytest
import torch
from core_toys import KEPT, KINDS, Trainer, assert_same, raw, run_python, snapshot
from torch.testing._internal.two_tensor import TwoTensor

from megastow import NotOnHostError, OffloadedError, UnsupportedTensorError, create_memory_manager
from megastow.host_view import HostViews
from megastow.on_host import on_host
from megastow.parked import Parked
from megastow.read_only import ReadOnlyTensor
from megastow.state import StateKind


@pytest.fixture
def manager(trainer):
    made = create_memory_manager(trainer.model, trainer.optimizer)
    with made.offloaded():
        pass
    made.offload()
    yield made
    made.close()


def test_clones_of_tied_weights_are_one():
    """As in the state dict of a model on the device: a file has their bytes once, and both names load to one tensor."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[2].weight = model[0].weight
    before = {name: raw(tensor) for name, tensor in model.state_dict().items()}
    with create_memory_manager(model) as manager, manager.offloaded():
        cloned = manager.on_host(model.state_dict, clone=True)
        assert {name: raw(tensor) for name, tensor in cloned.items()}.keys() == before.keys()
        assert all(torch.equal(raw(cloned[name]), before[name]) for name in before)
        places = {name: tensor.untyped_storage().data_ptr() for name, tensor in cloned.items()}
        assert places["0.weight"] == places["2.weight"]
        assert len(set(places.values())) == len(places) - 1


def whole_state(trainer):
    return {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict(), "main": trainer.main}


def leaves(value, path=""):
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: v for key, item in items for k, v in leaves(item, f"{path}/{key}").items()}


@pytest.mark.parametrize("clone", [False, True])
def test_state_dicts_are_those_that_were_on_the_device(clone):
    trainer = Trainer()
    trainer.step()
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    before = snapshot(leaves(whole_state(trainer)))
    manager.offload()
    state = manager.on_host(lambda: whole_state(trainer), clone=clone)
    found = leaves(state)
    assert_same(before, snapshot(found))
    assert state["model"]._metadata == Trainer().model.state_dict()._metadata
    classes = {type(t) for n, t in found.items() if not n.endswith("step")}
    assert classes == {torch.Tensor if clone else ReadOnlyTensor}
    assert (state["model"]["head.weight"] is state["model"]["embed.weight"]) is False  # as torch gives them
    file = io.BytesIO()
    torch.save(state, file)
    del state, found
    manager.onload()
    assert manager.plan().new_host_bytes == 0

    fresh = Trainer(seed=3)
    fresh.step()
    loaded = torch.load(io.BytesIO(file.getvalue()))
    fresh.model.load_state_dict(loaded["model"])
    fresh.optimizer.load_state_dict(loaded["optimizer"])
    for main, saved in zip(fresh.main, loaded["main"], strict=True):
        main.detach().copy_(saved)
    assert_same(before, snapshot(leaves(whole_state(fresh))))
    fresh._data.set_state(trainer._data.get_state())
    assert torch.equal(raw(trainer.step()), raw(fresh.step()))


def test_the_trainers_own_containers_stay_as_they_are(trainer, manager):
    state = trainer.optimizer.state[trainer.main[0]]
    before = dict(state)
    found = manager.on_host(lambda: trainer.optimizer.state_dict())
    assert state.keys() == before.keys()
    same = {
        "container": found["state"][0] is state,
        "inside": all(state[k] is before[k] for k in before),
        "moment": found["state"][0]["exp_avg"] is state["exp_avg"],
        "what lies on the host": found["state"][0]["step"] is state["step"],
        "what holds nothing that is away": manager.on_host(lambda: found["param_groups"]) is found["param_groups"],
    }  # as words: a failed assertion prints what it compares, and printing what is away crashes
    assert same == {
        "container": False,
        "inside": True,
        "moment": False,
        "what lies on the host": True,
        "what holds nothing that is away": True,
    }


def test_identity_holds_inside_and_what_was_one_tensor_comes_back_as_one(trainer, manager):
    weight = trainer.model.layers[0].weight

    def function():
        assert {weight: 1}[trainer.model.layers[0].weight] == 1
        assert weight.requires_grad
        assert isinstance(weight, torch.nn.Parameter)
        return [weight, {"again": weight}]

    first, again = manager.on_host(function)
    same = [first is each for each in (again["again"], weight)]
    assert same == [True, False]


@dataclasses.dataclass(frozen=True)
class Shard:
    key: str
    data: torch.Tensor


@dataclasses.dataclass
class Slotted:
    __slots__ = ("data", "left_out")
    data: torch.Tensor


class Anything:
    def __init__(self, value):
        self.inner = {"deep": [value]}
        self.myself = self


Pair = collections.namedtuple("Pair", "number tensor")


def test_tensors_are_replaced_in_whatever_holds_them(trainer, manager):
    weight = trainer.model.layers[0].weight
    expected = raw(manager.host_tensor(weight))
    shard, slotted, anything = Shard("a", weight), Slotted(weight), Anything(weight)
    holders = {
        "shard": (shard, lambda s: s.data),
        "slotted": (slotted, lambda s: s.data),
        "anything": (anything, lambda s: s.inner["deep"][0]),
        "pair": (Pair(1, weight), lambda p: p.tensor),
        "tuple": ((1, (weight,)), lambda t: t[1][0]),
        "ordered": (collections.OrderedDict(a=weight), lambda d: d["a"]),
        "default": (collections.defaultdict(list, a=[weight]), lambda d: d["a"][0]),
        "set": ({weight}, lambda s: next(iter(s))),
    }
    found = manager.on_host(lambda: {name: holder for name, (holder, _) in holders.items()})
    for name, (holder, get) in holders.items():
        assert type(found[name]) is type(holder)
        assert torch.equal(raw(get(found[name])), expected), name
        is_unchanged = get(holder) is weight
        assert is_unchanged, name
    model = trainer.model
    assert manager.on_host(lambda: model) is model


def test_only_this_call_in_this_thread_is_let_through(trainer, manager):
    model, errors = trainer.model, []

    def in_another_thread():
        try:
            model.state_dict()
        except OffloadedError as error:
            errors.append(error)

    def function():
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        thread.join()
        return model.state_dict()

    manager.on_host(function)
    assert len(errors) == 1
    with pytest.raises(OffloadedError):
        model.state_dict()
    with pytest.raises(LookupError, match="the function failed"):
        manager.on_host(lambda: [model.state_dict(), {}["the function failed"]])
    with pytest.raises(OffloadedError):
        model.state_dict()


def test_what_would_write_is_refused_and_nothing_is_changed(trainer, manager):
    model, weight, main = trainer.model, trainer.model.layers[0].weight, trainer.main[0]
    before = {kind: snapshot(manager.host_state_dict(kind)) for kind in KEPT}
    others = torch.zeros_like(weight, device="cpu", memory_format=torch.contiguous_format)
    good = Trainer(seed=5).model.state_dict()
    writes = {
        "in place": lambda: weight.detach().mul_(2),
        "in place, bare": lambda: weight.mul_(2),
        "copy": lambda: weight.detach()[1:].copy_(others[1:]),
        "out": lambda: torch.add(others, 1, out=weight.detach()),
        "foreach": lambda: torch._foreach_mul_([weight, main], 2),
        "item": lambda: weight.detach().__setitem__(0, 1.0),
        "data": lambda: setattr(weight, "data", others),
        "set": lambda: weight.detach().set_(others),
        "resize": lambda: weight.detach().resize_(3),
        "apply": lambda: main.detach().apply_(lambda x: 0.0),
        "step": lambda: trainer.optimizer.step(),
        "forward": lambda: model(torch.zeros(1, dtype=torch.long)),
        "half": lambda: model.half(),
        "move": lambda: manager.onload(),
        "offload": lambda: manager.offload(),
        "close": lambda: manager.close(discard=True),
    }
    for write in writes.values():
        with pytest.raises(OffloadedError):
            manager.on_host(write)
    with pytest.raises(OffloadedError):
        manager.on_host(lambda: model.load_state_dict(good))
    for kind in KEPT:
        assert_same(before[kind], snapshot(manager.host_state_dict(kind)))
    manager.onload()
    trainer.step()


def test_gradients_that_were_not_kept_are_refused(trainer, manager):
    assert manager.on_host(lambda: trainer.trained[0].grad.numel()) == trainer.trained[0].numel()
    for read in (lambda grad: grad.sum(), lambda grad: grad.tolist(), lambda grad: torch.ops.aten.sum(grad)):
        with pytest.raises(NotOnHostError, match="keep_grads=True"):
            manager.on_host(lambda read=read: read(trainer.trained[0].grad))
    with pytest.raises(NotOnHostError, match="keep_grads=True"):
        manager.on_host(lambda: trainer.trained[0].grad)


def test_wrappers_around_what_is_away_are_refused(trainer, manager):
    weight = trainer.model.layers[0].weight.detach()
    wrapper = TwoTensor(weight, weight)
    for use in (lambda: torch.sin(wrapper), lambda: wrapper + 1, lambda: wrapper):
        with pytest.raises(UnsupportedTensorError, match=r"inner ones \(a, b\)"):
            manager.on_host(use)


def test_a_call_in_inference_mode_and_calls_within_calls(trainer, manager):
    expected = snapshot(manager.host_state_dict("weights"))
    with torch.inference_mode():
        state = manager.on_host(lambda: manager.on_host(trainer.model.state_dict))
        cloned = manager.on_host(trainer.model.state_dict, clone=True)
    assert not any(t.is_inference() for t in (*state.values(), *cloned.values()))
    for name in expected:
        assert torch.equal(raw(state[name]), expected[name])
        assert torch.equal(raw(cloned[name]), expected[name])


def test_two_managers_of_one_trainer_each_lend_their_own(trainer):
    before = snapshot(leaves(whole_state(trainer)))
    first, second = (create_memory_manager(trainer.model, trainer.optimizer, bucket_bytes=1) for _ in range(2))
    first.offload("weights", "optimizer_states")
    second.offload("main_weights")
    with pytest.raises(OffloadedError):
        first.on_host(lambda: trainer.optimizer.step())
    state = first.on_host(lambda: second.on_host(lambda: whole_state(trainer)))
    assert_same(before, snapshot(leaves(state)))
    del state
    first.close()
    second.close()


def test_what_stays_on_the_device_stays_what_it_is(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    with manager.offloaded("optimizer_states"):
        state = manager.on_host(lambda: [trainer.main[0], trainer.optimizer.state_dict()])
        assert state[0] is trainer.main[0]
        assert type(state[1]["state"][0]["exp_avg"]) is ReadOnlyTensor


def test_every_way_to_read_what_is_away_reads_host_memory():
    """In a process of its own: a read of released memory is a segmentation fault."""
    print(
        run_python("""
import copy, io, pickle
import numpy, torch
from core_toys import Trainer, raw
from megastow import create_memory_manager

trainer, twin = Trainer(), Trainer()
for each in (trainer, twin):
    each.step()
manager = create_memory_manager(trainer.model, trainer.optimizer, bucket_bytes=1)
scripted = torch.jit.script(torch.nn.ReLU())
w = twin.main[0]  # what the functions below read
one = w.detach()[0, 0]

def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

reads = {
    "clone": lambda: w.clone(), "detach": lambda: w.detach(), "data": lambda: w.data, "cpu": lambda: w.cpu(),
    "itself": lambda: w, "float": lambda: w.double(), "view": lambda: w.view(-1), "slice": lambda: w[1:3],
    "transposed": lambda: w.t().contiguous(), "chunk": lambda: w.chunk(2)[1], "split": lambda: list(w.split(3)),
    "unbind": lambda: list(w.unbind()), "strided": lambda: w.as_strided((3,), (2,), 1), "T": lambda: w.T,
    "narrow": lambda: w.narrow(0, 1, 2), "numpy": lambda: w.detach().numpy().tolist(), "tolist": lambda: w.tolist(),
    "asarray": lambda: numpy.asarray(w.detach()).tolist(), "item": lambda: one.item(), "float()": lambda: float(one),
    "repr": lambda: repr(w.detach()), "str": lambda: str(w.data), "format": lambda: f"{one:.3f} {w.detach()}",
    "parameter repr": lambda: "[" in repr(w),
    "equal": lambda: torch.equal(w, w), "cat": lambda: torch.cat([w, w]), "mul": lambda: w * 2 + w,
    "matmul": lambda: w.t() @ w, "deepcopy": lambda: copy.deepcopy(w), "deepcopy2": lambda: copy.deepcopy(w.detach()),
    "pickle": lambda: pickle.loads(pickle.dumps(w.detach())), "parameter": lambda: pickle.loads(pickle.dumps(w)),
    "save": lambda: saved({"a": w, "b": w.detach()[1]}), "iter": lambda: [row for row in w],
    "contains": lambda: one in w, "from list": lambda: torch.tensor([w[0, 0], w[0, 1]]),
    "storage": lambda: list(w.untyped_storage())[:40], "new": lambda: w.new_tensor(w), "script": lambda: scripted(w),
    "ops": lambda: torch.ops.aten.add.Tensor(w, w),
    "copy out": lambda: torch.zeros(w.shape).copy_(w), "max": lambda: w.max(0), "any": lambda: bool((w == w).all()),
    "stack of rows": lambda: torch.stack(list(w)), "vmap": lambda: torch.vmap(lambda r: r.sum())(w),
    "grad mode": lambda: torch.enable_grad()(lambda: (w * 2).detach())(),
}

def plain(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype), raw(value).tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

expected = {}
with torch.no_grad():
    for name, read in reads.items():
        expected[name] = plain(read())
w = trainer.main[0]
one = w.detach()[0, 0]
manager.offload()
for name, read in reads.items():
    print(name, flush=True)
    assert plain(manager.on_host(read)) == expected[name], name
manager.onload()
print("all read")
""")
    )


def test_collectives_are_refused():
    print(
        run_python("""
import torch
import torch.distributed as dist
from core_toys import Trainer
from megastow import OffloadedError, create_memory_manager

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
trainer = Trainer()
trainer.step()
manager = create_memory_manager(trainer.model, trainer.optimizer)
manager.offload()
w = trainer.main[0]
room = torch.zeros(w.shape)
for call in (
    lambda: dist.all_reduce(w.detach()),
    lambda: dist.broadcast(w, 0),
    lambda: dist.all_gather([room], w.detach()),
    lambda: dist.all_gather([w.detach()], room),
    lambda: dist.all_gather_into_tensor(room, w.detach()),
):
    try:
        manager.on_host(call)
    except OffloadedError as error:
        assert "clone" in str(error), error
    else:
        raise SystemExit("a collective went through")
gathered = manager.on_host(lambda: [dist.all_gather([room], w.detach().clone()), room][1])
expected = manager.host_tensor(w)
assert torch.equal(gathered, expected)
del gathered, expected
manager.onload()
dist.destroy_process_group()
""")
    )


def test_operations_between_devices():
    """A tensor on torch's device `meta` stands for one on a GPU: it has no bytes, and CPU operations refuse it."""
    away = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    here = torch.arange(12.0).reshape(4, 3)

    class Slice:
        share = None

        def lend(self):
            return here.untyped_storage()

    views = HostViews([Parked(away.untyped_storage(), 48, StateKind.WEIGHTS, ("w",), Slice(), released=True)])
    reads = {
        "itself": (lambda w: w, here),
        "detach": (lambda w: w.detach(), here),
        "data": (lambda w: w.data, here),
        "view": (lambda w: w.view(-1)[3:7], here.view(-1)[3:7]),
        "cpu": (lambda w: w.cpu(), here),
        "clone": (lambda w: w.detach().clone(), here),
        "double": (lambda w: w.to("cpu", torch.float64), here.double()),
        "copy": (lambda w: torch.empty(4, 3).copy_(w), here),
        "item": (lambda w: w.sum(), here.sum()),
        "op": (lambda w: torch.ops.aten.t.default(w), here.t()),
    }
    for name, (read, expected) in reads.items():
        found = on_host(views, lambda read=read: read(away), clone=False)
        assert found.device.type == "cpu", name
        assert torch.equal(found, expected), name
        assert not found.requires_grad, name
    with pytest.raises(OffloadedError):
        on_host(views, lambda: away.detach().zero_(), clone=False)


def test_all_kinds_can_be_read_after_a_move_that_kept_gradients(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    before = snapshot(trainer.tensors())
    manager.offload(keep_grads=True)
    state = manager.on_host(lambda: {n: t for kind in KINDS for n, t in trainer.tensors((kind,)).items()})
    assert_same(before, snapshot(state))
    del state
    manager.onload()
