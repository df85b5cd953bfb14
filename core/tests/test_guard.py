"""Use of what is away raises, and nothing is left of the guard afterwards."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from core_toys import KINDS, Trainer, assert_same, raw, run_python, snapshot

from megastow import OffloadedError, create_memory_manager
from megastow.guard import Blocked, Guard, GuardedCalls, call_table
from megastow.state import StateKind

TOKENS = torch.zeros(1, dtype=torch.long)


def uses(trainer):
    """Calls by the kind that they need; made while all is here, and looked up when called."""
    model, optimizer = trainer.model, trainer.optimizer
    state, moments = model.state_dict(), optimizer.state_dict()
    weights = {
        "model": lambda: model(TOKENS),
        "model.forward": lambda: model.forward(TOKENS),
        "submodule": lambda: model.norm(torch.zeros(16, dtype=torch.bfloat16)),
        "state_dict": lambda: model.state_dict(),
        "submodule.state_dict": lambda: model.head.state_dict(),
        "load_state_dict": lambda: model.load_state_dict(state),
        "to": lambda: model.to(torch.float32),
        "half": lambda: model.half(),
        "share_memory": lambda: model.share_memory(),
        "deepcopy": lambda: copy.deepcopy(model),
        "copy": lambda: copy.deepcopy([model.layers[0]]),
        "pickle": lambda: pickle.dumps(model),
        "python pickle": lambda: pickle._dumps(model),
        "torch.save": lambda: torch.save(model, io.BytesIO()),
    }
    steps = {
        "step": lambda: optimizer.step(),
        "step with a closure": lambda: optimizer.step(lambda: None),
        "optimizer deepcopy": lambda: copy.deepcopy(optimizer),
        "optimizer pickle": lambda: pickle.dumps(optimizer),
    }
    return {
        "weights": {**weights, **steps},
        "main_weights": steps,
        "optimizer_states": {
            **steps,
            "optimizer.state_dict": lambda: optimizer.state_dict(),
            "optimizer.load_state_dict": lambda: optimizer.load_state_dict(moments),
        },
        "grad_buffers": {
            **steps,
            "zero_grad": lambda: optimizer.zero_grad(),
            "zero": lambda: optimizer.zero_grad(set_to_none=False),
        },
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_use_is_refused_and_then_works(trainer, kind):
    owners = [*trainer.model.modules(), trainer.optimizer]
    before = snapshot(trainer.tensors())
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    attributes = [dict(vars(owner)) for owner in owners]
    calls = uses(trainer)[kind]
    manager.offload(kind, keep_grads=True)
    for call in calls.values():
        with pytest.raises(OffloadedError, match=rf"{kind}.*manager\.onload\('{kind}'\)"):
            call()
    manager.onload()
    after = [dict(vars(owner)) for owner in owners]
    assert [a.keys() for a in after] == [a.keys() for a in attributes]
    assert all(x[k] is y[k] for x, y in zip(after, attributes, strict=True) for k in x)
    assert_same(before, snapshot(trainer.tensors()))
    trainer.model(TOKENS)
    copy.deepcopy(trainer.model)(TOKENS)
    trainer.step()
    manager.close()


def test_a_block_names_all_that_is_missing_and_only_that(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    manager.offload("main_weights", "optimizer_states")
    with pytest.raises(
        OffloadedError, match=r"step of Adam needs main_weights, optimizer_states.*'main_weights', 'opt"
    ):
        trainer.optimizer.step()
    trainer.model(TOKENS)
    trainer.model.state_dict()
    manager.onload("main_weights")
    with pytest.raises(OffloadedError, match=r"step of Adam needs optimizer_states,"):
        trainer.optimizer.step()
    manager.onload()


def test_attributes_that_were_on_the_instance_come_back(trainer):
    """A learning-rate scheduler puts a wrapped `step` on the optimizer."""
    scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1)
    trainer.model.forward = lambda tokens, inner=trainer.model.forward: inner(tokens)
    before = [dict(vars(trainer.optimizer)), dict(vars(trainer.model))]
    assert "step" in before[0]
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    with manager.offloaded(), pytest.raises(OffloadedError):
        trainer.optimizer.step()
    manager.close()
    assert [vars(trainer.optimizer), vars(trainer.model)] == before
    trainer.step()
    scheduler.step()


def test_what_somebody_else_put_there_meanwhile_is_left_alone(trainer):
    manager = create_memory_manager(trainer.model)
    manager.offload()
    trainer.model.forward = mine = lambda tokens: tokens
    manager.onload()
    assert trainer.model.forward is mine


def test_managers_of_one_trainer_share_the_guard(trainer):
    """Each blocks for what it took; whoever comes back first must not unblock the other, nor bring its block back."""
    before = [dict(vars(o)) for o in (trainer.optimizer, *trainer.model.modules())]
    first, second = (create_memory_manager(trainer.model, trainer.optimizer) for _ in range(2))
    for early, late in ((first, second), (second, first)):
        first.offload("weights", "main_weights")
        second.offload("optimizer_states")
        for manager in (early, late):
            with pytest.raises(OffloadedError):
                trainer.optimizer.step()
            manager.onload()
        trainer.optimizer.step()
        trainer.model(TOKENS)
    first.close()
    second.close()
    assert [dict(vars(o)) for o in (trainer.optimizer, *trainer.model.modules())] == before


def test_copies_and_pickles_of_a_watched_module_are_free_of_us(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    twin = copy.deepcopy(trainer.model)
    data = io.BytesIO()
    torch.save(trainer.model, data)
    assert b"megastow" not in pickle.dumps(trainer.model)
    data.seek(0)
    loaded = torch.load(data, weights_only=False)
    with manager.offloaded():
        for other in (twin, loaded):
            other(TOKENS).float().sum().backward()
    manager.onload()


def test_an_output_that_is_a_parameter_collects_no_hooks():
    class Model(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), self.weight

    model = Model(2, 2)
    with create_memory_manager(model):
        for _ in range(3):
            model(torch.ones(1, 2))
    assert not model.weight._backward_hooks


class Part:
    def use(self):
        return "used"

    def look(self):
        return "seen"


_PART_CALLS = call_table(((StateKind.WEIGHTS, StateKind.GRAD_BUFFERS), "use"), ((StateKind.WEIGHTS,), "look"))


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def listing(*parts):
    return lambda: [GuardedCalls(part, _PART_CALLS) for part in parts]


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ({"weights"}, {"weights"}, {"use": "weights", "look": "weights"}),
        ({"weights"}, {"weights", "grad_buffers"}, {"use": "weights, grad_buffers", "look": "weights"}),
        ({"weights"}, {"grad_buffers"}, {"use": "grad_buffers"}),
        ({"grad_buffers"}, {"weights"}, {"use": "weights", "look": "weights"}),
    ],
)
def test_what_stood_there_before_says_what_is_away_now(first, second, refused):
    part, guard = Part(), Guard()
    for away in (first, second):
        guard.update(frozenset(map(StateKind, away)), listing(part))
        if away is second:
            for method in ("use", "look"):
                if method in refused:
                    with pytest.raises(OffloadedError, match=f"needs {refused[method]}, which"):
                        getattr(part, method)()
                else:
                    assert part.look() == "seen"
        guard.update(frozenset(), listing(part))
        assert (part.use(), part.look(), vars(part)) == ("used", "seen", {})


def test_guards_that_take_turns_block_for_themselves_only():
    part, one, other = Part(), Guard(), Guard()
    for _ in range(2):
        one.update({StateKind.WEIGHTS}, listing(part))
        other.update({StateKind.WEIGHTS}, listing(part))
        one.update(frozenset(), listing(part))
        with pytest.raises(OffloadedError):
            part.look()
        other.update(frozenset(), listing(part))
        assert (part.look(), vars(part)) == ("seen", {})


def test_what_somebody_has_kept_is_no_block_of_anybody():
    """Saved while one guard has it up, and put back when nothing is away: another one takes it down with its own."""
    part, one, other = Part(), Guard(), Guard()
    one.update({StateKind.WEIGHTS}, listing(part))
    kept = part.look
    one.update(frozenset(), listing(part))
    part.look = kept
    assert part.look() == "seen"
    other.update({StateKind.WEIGHTS}, listing(part))
    with pytest.raises(OffloadedError):
        part.look()
    other.update(frozenset(), listing(part))
    assert vars(part) == {}
    assert copy.deepcopy(part).look() == "seen"


def test_a_part_that_is_called_by_another_is_blocked_all_the_same():
    """Which was given its method while that was blocked, by two guards."""
    outer, inner, one, other = Part(), Part(), Guard(), Guard()
    table = call_table(((StateKind.WEIGHTS,), "look"), ((StateKind.GRAD_BUFFERS,), "use"))

    def calls():
        return [GuardedCalls(outer, table), GuardedCalls(inner, table)]

    both = {StateKind.WEIGHTS, StateKind.GRAD_BUFFERS}
    one.update(both, calls)
    other.update({StateKind.WEIGHTS}, calls)
    outer.look = inner.look
    one.update({StateKind.WEIGHTS}, calls)
    one.update(frozenset(), calls)
    other.update(frozenset(), calls)
    assert outer.look() == inner.look() == "seen"
    del outer.look
    one.update(both, calls)
    for part in (outer, inner):
        with pytest.raises(OffloadedError):
            part.look()
    one.update(frozenset(), calls)
    assert vars(outer) == vars(inner) == {}


def test_a_part_that_has_left_the_trainer_is_free_behind_a_wrapper():
    part, stays, guard = Part(), Part(), Guard()
    guard.update({StateKind.WEIGHTS}, listing(part, stays))
    inner = part.look
    part.look = lambda: inner()
    guard.update(frozenset(), listing(part, stays))
    guard.update({StateKind.WEIGHTS}, listing(stays))
    assert part.look() == "seen"
    guard.close()


def test_an_owner_with_two_tables_is_blocked_for_each_from_the_first_moment(monkeypatch):
    """Kinds that came back one after the other do not change what the next move blocks."""
    part, guard, seen = Part(), Guard(), []
    tables = [call_table(((kind,), "look")) for kind in (StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS)]

    def calls(*chosen):
        return lambda: [GuardedCalls(part, table) for table in chosen]

    guard.update({StateKind.WEIGHTS}, calls(*tables))
    guard.update({StateKind.MAIN_WEIGHTS}, calls(*tables))
    guard.update(frozenset(), calls(*tables))

    def watched(method):
        def blocking(self, *where):
            method(self, *where)
            with pytest.raises(OffloadedError):
                part.look()
            seen.append(part)

        return blocking

    monkeypatch.setattr(Guard, "_block", watched(Guard._block))
    monkeypatch.setattr(Guard, "_stand_at", watched(Guard._stand_at))
    guard.update({StateKind.WEIGHTS}, calls(*tables))
    assert seen == [part, part]
    guard.update({StateKind.MAIN_WEIGHTS}, calls(*tables))
    guard.update(frozenset(), calls(*tables))
    guard.update({StateKind.WEIGHTS}, calls(tables[0]))
    with pytest.raises(OffloadedError):
        part.look()
    guard.update(frozenset(), calls(tables[0]))
    assert vars(part) == {}


def test_an_owner_with_two_tables_says_what_is_missing_by_both():
    part, guard = Part(), Guard()
    tables = (
        call_table(((StateKind.MAIN_WEIGHTS,), "look")),
        call_table(((StateKind.WEIGHTS,), "look use")),
    )
    for order in (tables, tables[::-1]):
        guard.update(set(KINDS), lambda order=order: [GuardedCalls(part, table) for table in order])
        with pytest.raises(OffloadedError, match="look of Part needs weights, main_weights"):
            part.look()
        guard.update(frozenset(), lambda: ())


def test_kinds_that_go_one_after_the_other_are_blocked_with_what_has_changed_meanwhile():
    """Each step adds to what stands; what somebody puts on an instance in between is blocked as well."""
    table = call_table(((StateKind.WEIGHTS,), "look other"), ((StateKind.GRAD_BUFFERS,), "use"))
    for between in (lambda part: None, lambda part: vars(part).update(other=lambda: "other")):
        part, guard = Part(), Guard()
        guard.update({StateKind.WEIGHTS}, lambda part=part: [GuardedCalls(part, table)])
        assert part.use() == "used"
        between(part)
        own = {name: value for name, value in vars(part).items() if name == "other"}
        for away in ({StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS}, {StateKind.WEIGHTS, StateKind.GRAD_BUFFERS}):
            guard.update(away, lambda part=part: [GuardedCalls(part, table)])
            for method in ("look", *own):
                with pytest.raises(OffloadedError, match=f"{method} of Part needs weights, which is"):
                    getattr(part, method)()
        with pytest.raises(OffloadedError, match="use of Part needs grad_buffers"):
            part.use()
        guard.update({StateKind.GRAD_BUFFERS}, lambda part=part: [GuardedCalls(part, table)])
        assert part.look() == "seen"
        guard.update(frozenset(), lambda: ())
        assert vars(part) == own


def test_a_method_taken_while_kinds_go_one_after_the_other_stays_the_one_that_is_blocked():
    """A patch that is taken back leaves nothing, and what was taken knows of guards that have come since."""
    part, guard, other = Part(), Guard(), Guard()
    guard.update({StateKind.WEIGHTS}, listing(part))
    taken = part.look
    guard.update({StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS}, listing(part))
    part.look = lambda: "patched"
    part.look = taken
    guard.update(frozenset(), listing(part))
    assert vars(part) == {}
    guard.update({StateKind.WEIGHTS}, listing(part))
    taken = part.look
    guard.update({StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS}, listing(part))
    other.update({StateKind.WEIGHTS}, listing(part))
    guard.update({StateKind.MAIN_WEIGHTS}, listing(part))
    with pytest.raises(OffloadedError):
        taken()


def test_an_owner_whose_attributes_are_replaced_between_two_kinds_keeps_its_own():
    table = call_table(((StateKind.WEIGHTS,), "look other"))
    part, guard = Part(), Guard()
    guard.update({StateKind.WEIGHTS}, lambda: [GuardedCalls(part, table)])
    own = {"look": lambda: "mine", "other": lambda: "other"}
    part.__dict__ = {**own}
    guard.update({StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS}, lambda: [GuardedCalls(part, table)])
    for method in own:
        with pytest.raises(OffloadedError):
            getattr(part, method)()
    guard.update(frozenset(), lambda: ())
    assert vars(part) == own


@pytest.mark.parametrize("has_own", [False, True])
def test_an_owner_at_which_nothing_is_to_be_blocked_is_not_kept(no_collector, has_own):
    part, guard = Part(), Guard()
    part.payload = payload = Part()
    if has_own:
        part.look = lambda: "mine"
    gone = weakref.ref(payload)
    guard.update({StateKind.OPTIMIZER_STATES}, listing(part))
    guard.update(frozenset(), listing(part))
    del part, payload
    assert gone() is None


def test_an_owner_with_two_tables_of_other_methods_is_free_of_both_afterwards():
    part, guard = Part(), Guard()
    tables = [call_table(((StateKind.WEIGHTS,), method)) for method in ("look", "use")]
    for _ in range(2):
        guard.update({StateKind.WEIGHTS}, lambda: [GuardedCalls(part, table) for table in tables])
        for call in (part.look, part.use):
            with pytest.raises(OffloadedError):
                call()
        guard.update(frozenset(), lambda: ())
        assert vars(part) == {}


def test_a_trainer_that_has_changed_between_two_moves_is_blocked_as_it_is_now():
    """Another class of an instance that is still there, and other kinds that a method needs."""

    class Wrapped(Part):
        def see(self):
            return "seen"

    part, guard = Part(), Guard()
    before = call_table(((StateKind.WEIGHTS,), "look see"))
    after = call_table(((StateKind.WEIGHTS,), "see"), ((StateKind.MAIN_WEIGHTS,), "look"))

    def refused(table, *away):
        guard.update(set(away), lambda: [GuardedCalls(part, table)])
        calls = []
        for method in ("look", "see"):
            try:
                getattr(part, method, str)()
            except OffloadedError:
                calls.append(method)
        guard.update(frozenset(), lambda: ())
        assert vars(part) == {}
        return calls

    assert refused(before, StateKind.WEIGHTS) == ["look"]
    part.__class__ = Wrapped
    assert refused(before, StateKind.WEIGHTS) == ["look", "see"]
    assert refused(after, StateKind.WEIGHTS) == ["see"]
    part.__class__ = Part
    assert refused(after, StateKind.WEIGHTS) == []
    assert refused(after, StateKind.MAIN_WEIGHTS) == ["look"]
    assert refused(before, StateKind.WEIGHTS) == ["look"]


class Proxy:
    """Around a method, as tracing puts one: it says that it is equal to that."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self):
        return self.inner(), "traced"

    def __eq__(self, other):
        return self.inner == other

    __hash__ = None


class Undecided(Proxy):
    def __eq__(self, other):
        raise RuntimeError("equal in which sense?")

    __hash__ = None


@pytest.mark.parametrize("around", [Proxy, Undecided])
def test_what_is_put_around_a_method_stays_whatever_it_is_equal_to(around):
    part, guard = Part(), Guard()
    guard.update({StateKind.WEIGHTS}, listing(part))
    part.look = mine = around(part.look)
    with pytest.raises(OffloadedError):
        part.look()
    guard.update(frozenset(), listing(part))
    assert vars(part)["look"] is mine
    assert part.look() == ("seen", "traced")


class OnlyAttributes:
    """Cannot be referred to weakly."""

    __slots__ = ("__dict__",)

    def use(self):
        return "used"


def test_an_owner_that_cannot_be_referred_to_weakly_is_blocked_and_not_kept(no_collector):
    guard = Guard()
    owner = OnlyAttributes()
    for _ in range(3):
        owner.payload = payload = Part()
        gone = weakref.ref(payload)
        guard.update({StateKind.WEIGHTS}, listing(Part(), owner))
        with pytest.raises(OffloadedError):
            owner.use()
        guard.update(frozenset(), listing(owner))
        assert vars(owner) == {"payload": payload}
        owner, payload = OnlyAttributes(), None
        assert gone() is None


def test_the_class_of_what_a_trainer_drops_is_gone_with_it(no_collector):
    """`torch.nn.utils.parametrize` makes one for each module, and what that is made with knows the module."""
    guard, payload = Guard(), Part()
    part = type("Parametrized", (Part,), {"payload": payload})()
    gone = weakref.ref(payload)
    guard.update({StateKind.WEIGHTS}, listing(part))
    guard.update(frozenset(), listing(part))
    del part, payload
    gc.collect()  # a class is a cycle by itself
    assert gone() is None


def test_what_stood_at_a_trainer_that_has_changed_is_gone_without_a_collector(no_collector):
    def number():
        return sum(type(each) is Blocked for each in gc.get_objects())

    before, guard = number(), Guard()
    for _ in range(3):
        parts = Part(), Part()
        for kind in (StateKind.WEIGHTS, StateKind.GRAD_BUFFERS):
            guard.update({kind}, listing(*parts))
            guard.update(frozenset(), listing(*parts))
        assert number() == before + len(parts)  # what stood there last, and nothing else
    guard.close()
    assert number() == before


def test_what_a_trainer_drops_between_two_moves_is_gone():
    """Its device memory, too: a layer that is replaced, an optimizer that is made anew."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    manager = create_memory_manager(model)
    for _ in range(2):
        with manager.offloaded():
            pass
        gone = weakref.ref(model[0].weight)
        model[0] = torch.nn.Linear(2, 2)
        assert gone() is None
    manager.close()


def test_what_stood_there_is_not_taken_for_that_of_another():
    """Of a part that is gone, whose place in memory a new one may have."""
    guard = Guard()
    for _ in range(100):
        part = Part()
        guard.update({StateKind.WEIGHTS}, listing(part))
        with pytest.raises(OffloadedError, match="look of Part"):
            part.look()
        guard.update(frozenset(), listing(part))
        assert (part.look(), vars(part)) == ("seen", {})
        del part
    guard.close()


def test_closing_twice_and_updating_with_nothing_is_fine():
    guard, owner = Guard(), torch.nn.Linear(2, 2)
    calls = GuardedCalls(owner, call_table(((StateKind.WEIGHTS,), "forward no_such_method")))
    guard.update(frozenset(), lambda: [calls])
    guard.update({StateKind.WEIGHTS}, lambda: [calls, calls])
    assert "no_such_method" not in vars(owner)
    with pytest.raises(OffloadedError):
        owner(torch.ones(2))
    guard.close()
    guard.close()
    assert "forward" not in vars(owner)
    owner(torch.ones(2))


def test_a_guard_whose_calls_cannot_be_listed_is_brought_in_line_by_the_next_move():
    guard, owner = Guard(), torch.nn.Linear(2, 2)

    def broken():
        raise RuntimeError("the adapter failed")

    with pytest.raises(RuntimeError):
        guard.update({StateKind.WEIGHTS}, broken)
    calls = GuardedCalls(owner, call_table(((StateKind.WEIGHTS,), "forward __deepcopy__")))
    unguardable = GuardedCalls(object(), calls.calls)
    with pytest.raises(TypeError):
        guard.update({StateKind.WEIGHTS}, lambda: [unguardable, calls])
    guard.update({StateKind.WEIGHTS}, lambda: [calls])
    with pytest.raises(OffloadedError):
        owner(torch.ones(2))
    guard.update(frozenset(), broken)
    owner(torch.ones(2))


@pytest.mark.parametrize(
    "compiled", [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m]
)
def test_compiled_modules_are_guarded_too(compiled):
    model = compiled(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    expected = raw(model(torch.ones(1, 2)))
    manager = create_memory_manager(model)
    with manager.offloaded(), pytest.raises(OffloadedError):
        model(torch.ones(1, 2))
    assert torch.equal(expected, raw(model(torch.ones(1, 2))))


def test_backward_through_an_older_graph_raises_instead_of_crashing():
    """In a process of its own: without the guard this is a segmentation fault."""
    print(
        run_python("""
import dataclasses, collections
import torch
from megastow import OffloadedError, create_memory_manager

@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    rest: object = None

Pair = collections.namedtuple("Pair", "a b")
shapes = {
    "tensor": (lambda y: y, lambda o: o),
    "tuple": (lambda y: (None, (y, 1)), lambda o: o[1][0]),
    "namedtuple": (lambda y: Pair(1, y), lambda o: o.b),
    "list": (lambda y: [y], lambda o: o[0]),
    "dict": (lambda y: {"a": {"b": [y]}}, lambda o: o["a"]["b"][0]),
    "ordered": (lambda y: collections.OrderedDict(a=y), lambda o: o["a"]),
    "dataclass": (lambda y: Output(y), lambda o: o.logits),
    "nested dataclass": (lambda y: Output(None, [y]), lambda o: o.rest[0]),
}

class Model(torch.nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.layers(x))

for name, (wrap, unwrap) in shapes.items():
    for kind in ("weights", "grad_buffers"):
        torch.manual_seed(0)
        model = Model(wrap)
        manager = create_memory_manager(model)
        unwrap(model(torch.ones(2, 64))).sum().backward()
        y = unwrap(model(torch.ones(2, 64)))
        y = y.mul_(2) if name == "list" else y
        manager.offload(kind, keep_grads=True)
        before = None
        try:
            y.sum().backward(retain_graph=True)
        except OffloadedError as error:
            assert "backward needs " + kind in str(error), error
        else:
            raise SystemExit(f"{name}: went through without {kind}")
        manager.onload()
        grad = model.layers[0].weight.grad.clone()
        y.sum().backward()
        expected = grad * (3 if name == "list" else 2)
        assert torch.equal(model.layers[0].weight.grad, expected), name
        manager.close()
print("all raised")
""")
    )


def test_a_method_that_an_instance_only_passes_on_is_guarded_on_the_instance():
    """A wrapper whose `__getattr__` finds everything in what it wraps, as torch's DataParallel relatives do."""

    class Wrapper:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

    guard, owner = Guard(), Wrapper(torch.nn.Linear(2, 2))
    guard.update({StateKind.WEIGHTS}, lambda: [GuardedCalls(owner, call_table(((StateKind.WEIGHTS,), "forward")))])
    with pytest.raises(OffloadedError, match="forward of Wrapper needs weights"):
        owner.forward(torch.ones(2))
    guard.close()
    assert vars(owner).keys() == {"inner"}
    owner.forward(torch.ones(2))


# --- who loses the manager -------------------------------------------------------------------------------------------


def test_a_manager_that_nobody_holds_keeps_what_is_away(trainer):
    before = snapshot(trainer.tensors())
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    manager.offload(keep_grads=True)
    lost = weakref.ref(manager)
    del manager
    gc.collect()
    with pytest.raises(OffloadedError):
        trainer.model(TOKENS)
    lost().onload()
    assert_same(before, snapshot(trainer.tensors()))
    assert lost() is None  # held by nothing any more, not even by a cycle


def test_a_manager_goes_with_its_trainer():
    trainer = Trainer()
    trainer.step()
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    trainer.model.last = trainer.forward()  # a graph, whose hooks the collector does not see
    manager.offload()
    gone = [weakref.ref(manager), weakref.ref(trainer.model)]
    del manager, trainer
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_managers_that_are_dropped_leave_no_hooks(trainer):
    hooks = trainer.model._forward_hooks
    assert not hooks
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    manager.offload()
    manager.onload()
    assert len(hooks) == 1
    del manager
    assert not hooks


def test_what_was_discarded_is_said_to_be_lost(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    manager.offload()
    manager.close(discard=True)
    gone = weakref.ref(manager)
    del manager
    gc.collect()
    assert gone() is None
    for use in (lambda: trainer.model(TOKENS), trainer.optimizer.step):
        with pytest.raises(OffloadedError, match=r"offloaded and lost.*discard=True.*checkpoint"):
            use()


# --- what else looks at methods --------------------------------------------------------------------------------------


def scheduler_of(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


@pytest.mark.filterwarnings("error")
def test_a_scheduler_takes_no_notice(trainer):
    before = scheduler_of(trainer.optimizer)
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    trainer.step()
    with manager.offloaded():
        before.step()
        meanwhile = scheduler_of(trainer.optimizer)
        with pytest.raises(OffloadedError):
            trainer.optimizer.step()
    trainer.step()
    meanwhile.step()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01 / 4
    with manager.offloaded("main_weights"), pytest.raises(OffloadedError):
        trainer.optimizer.step()
    trainer.step()


def test_what_is_blocked_has_the_name_of_the_method_and_nothing_made_up(trainer):
    with create_memory_manager(trainer.model, trainer.optimizer).offloaded():
        step = trainer.optimizer.step
        assert step.__name__ == step.__func__.__name__ == "step"
        for name in ("__wrapped__", "__setstate__", "no_such_thing"):
            assert not hasattr(step, name)


def test_a_model_whose_gradients_are_away_is_not_copied(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    with manager.offloaded("grad_buffers"), pytest.raises(OffloadedError, match="cannot be copied or pickled"):
        copy.deepcopy(trainer.model)
    copy.deepcopy(trainer.model)


def test_a_model_is_compiled_as_one_graph():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    manager = create_memory_manager(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.ones(2, 4)
    compiled(tokens).sum().backward()
    expected = compiled(tokens).detach()
    refusals = OffloadedError, torch._dynamo.exc.Unsupported  # what stands in the way cannot be a part of a graph
    with manager.offloaded(keep_grads=True), pytest.raises(refusals):
        compiled(tokens)
    assert torch.equal(compiled(tokens), expected)


def test_reading_is_told_of_the_host(trainer):
    with create_memory_manager(trainer.model, trainer.optimizer).offloaded():
        with pytest.raises(OffloadedError, match=r"manager\.on_host"):
            trainer.model.state_dict()
        with pytest.raises(OffloadedError) as raised:
            trainer.model(TOKENS)
        assert "on_host" not in str(raised.value)
