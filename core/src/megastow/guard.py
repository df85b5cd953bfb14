"""While a kind is away, whatever would touch it raises `OffloadedError` instead of reading released memory.

Without a guard a use of released storage is a segmentation fault on the CPU, an illegal address on a GPU (which poisons
the CUDA context for good), or, for `state_dict` and `torch.save`, silently wrong.

A method is blocked by an attribute of the same name on the instance, which Python finds first; taking it away again
leaves the instance as it was. Managers that share an instance share the attribute: the last to let go takes it away.
While what is away is on its way back, a blocked call waits for it instead, and then goes through.

Calls of a module are blocked at `_call_impl`, ahead of all hooks (Megatron's own forward pre-hooks gather parameters).
A backward pass through a graph made before the offload cannot be blocked that way: a gradient hook on the model's
outputs stands at its entrance.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import operator
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, NoReturn, cast

import torch

from megastow import threads
from megastow.errors import OffloadedError
from megastow.forking import process_lock
from megastow.state import ALL_KINDS, StateKind

_MISSING = object()


CallTable = Mapping[str, frozenset[StateKind]]
"""Names of methods, and the kinds that each reads or writes."""


class GuardedCalls(NamedTuple):
    """Methods of an instance that must not run while any of their kinds is away.

    Attributes:
        owner: the instance.
        calls: names of methods, and the kinds that each reads or writes; a name that the instance does not have is
            passed over, except `__deepcopy__`, which Python looks for on every instance. One table serves many owners.
    """

    owner: object
    calls: CallTable


def call_table(*rows: tuple[Iterable[StateKind], str]) -> CallTable:
    """A table of calls from rows of kinds and the names, separated by spaces, of the methods that need them."""
    return {method: frozenset(kinds) for kinds, methods in rows for method in methods.split()}


class _Gate:
    """What a guard shares with all that it has put up; hooks on tensors outlive it.

    Attributes:
        away: the kinds that are away.
        arriving: the move that brings some of them back just now.
        reader: the thread that may read what is away, because it reads in host memory.
        lock: held while the guard is between the two. Entered itself and not through `changed`, whose methods are
            Python and could be interrupted before they let go.
        changed: notified when either has changed.
        pid: the process of the guard. A fork has a copy of all this, in which nothing changes any more.
        is_lost: whether nobody has the bytes any more.
    """

    def __init__(self) -> None:
        self.is_lost = False
        self.away: set[StateKind] = set()
        self.arriving: Future[Any] | None = None
        self.pid = os.getpid()
        self.reader: int | None = None
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)

    @property
    def is_read_here(self) -> bool:
        """Whether this thread reads in host memory just now; a forked child has none."""
        return self.reader == threading.get_ident() and self.pid == os.getpid()

    def wait(self, kinds: Set[StateKind]) -> BaseException | None:
        """Wait until none of `kinds` is on its way any more; returns what the move failed with, if it did.

        Does not wait in a fork, nor in a finalizer that runs in a thread of the move itself.
        """
        if os.getpid() != self.pid or threads.is_ours():
            return None
        with self.lock:
            arriving = self.arriving
            self.changed.wait_for(lambda: self.arriving is None or not self.away & kinds)
            arrived = not self.away & kinds
        return None if arriving is None or arrived else arriving.exception()


class _Hold:
    """What blocked calls know of a guard, and hooks do not: the collector does not see what hangs on autograd graphs.

    Attributes:
        gate: of the guard.
        keeper: what has the bytes that are away, held by all that is blocked for as long as it is: who loses sight of
            it must not lose them. None when nothing is away.
    """

    def __init__(self, gate: _Gate) -> None:
        self.gate = gate
        self.keeper: object = None


class Guard:
    """Blocks and unblocks the guarded calls of one manager. What it has hung on modules goes with it."""

    def __init__(self) -> None:
        self._gate = _Gate()
        self._hold = _Hold(self._gate)
        # By identity of an owner: its attributes; what stands among them where methods were, in a new mapping whenever
        # that changes; and the post, where it is what belongs there.
        self._blocked: dict[int, tuple[dict[str, Any], Mapping[str, Blocked], _Post | None]] = {}
        # Where it stood the last time that state went from a trainer which had all: mostly it will stand there again.
        self._formation = _EMPTY
        self._is_settled = True
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._unhook = weakref.finalize(self, _remove, self._hooks)
        self._unhook.atexit = False

    def update(
        self,
        away: Set[StateKind],
        calls: Callable[[], Iterable[GuardedCalls]],
        arriving: Future[Any] | None = None,
        keeper: object = None,
    ) -> None:
        """Block exactly those calls that need a kind that is away now; what interrupts it is made up for next time.

        Args:
            away: the kinds that are not on the device.
            calls: lists what touches them.
            arriving: a move that brings some back just now; blocked calls wait for it before they refuse.
            keeper: what has their bytes, and is kept alive by what is blocked.
        """
        with self._gate.lock:
            self._gate.arriving = arriving
            self._hold.keeper = keeper if away else None
            try:
                if not (self._is_settled and away == self._gate.away):
                    with _REPLACING:
                        self._replace(away, calls)
            finally:
                self._gate.changed.notify_all()

    def _replace(self, away: Set[StateKind], calls: Callable[[], Iterable[GuardedCalls]]) -> None:
        """Block first, unblock then: at no moment may a call through that must not, whichever thread makes it.

        Only a trainer that had all of its state is blocked as it was the last time. While kinds go and come one by one,
        what stands stays the same object: other guards may need it by now, and others may have taken it.
        """
        needed = list(calls()) if away else []
        before = list(self._blocked)
        self._is_settled = False
        self._gate.away.update(away)
        formation = self._formation if self._formation.is_for(needed, away) else _Formation.of(needed, away)
        if needed and not before:
            self._formation = formation
        blocked_now: dict[int, _Blocks] = {}  # by identity of the owner
        for (owner, table), post in zip(needed, formation.posts, strict=True):
            attributes = vars(owner)
            candidates = post.candidates
            if candidates.are_certain and id(owner) not in self._blocked and attributes.keys().isdisjoint(table):
                blocks = candidates.certain  # as it mostly is
                self._stand_at(post, owner, attributes)
            else:
                blocks = candidates.on(owner)
                if id(owner) in blocked_now:
                    blocks = _union(blocks, blocked_now[id(owner)])
                self._block(owner, blocks)
            blocked_now[id(owner)] = blocks
        for owner_id in before:
            self._unblock(owner_id, blocked_now.get(owner_id, {}))
        self._gate.away.intersection_update(away)
        self._is_settled = True

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Let `READING_CALLS` through that this thread makes in the block; it must not read released memory."""
        before = self._gate.reader
        self._gate.reader = threading.get_ident()
        try:
            yield
        finally:
            self._gate.reader = before

    def watch_backward(self, modules: Iterable[torch.nn.Module]) -> None:
        """Check every backward pass that enters one of `modules` from its outputs, until `close`."""
        self._hooks += [module.register_forward_hook(_BackwardWatch(self._gate)) for module in modules]

    def give_up(self) -> None:
        """Let go of whoever has the bytes, which are lost: what is blocked stays so, and says that."""
        self._hold.keeper = None
        self._gate.is_lost = True
        self._unhook.detach()

    def close(self) -> None:
        """Remove everything."""
        with _REPLACING:
            for owner_id in list(self._blocked):
                self._unblock(owner_id, {})
        self._formation = _EMPTY
        self._gate.away.clear()
        _remove(self._hooks)

    def _stand_at(self, post: _Post, owner: object, attributes: dict[str, Any]) -> None:
        """Block an instance that has nothing of its own, nor of another guard, where its methods are."""
        standing = post.standing or post.fill(owner, self._hold)
        self._blocked[id(owner)] = attributes, standing, post
        attributes.update(standing)

    def _block(self, owner: object, blocks: _Blocks) -> None:
        """Block any instance, in front of and together with what is there."""
        attributes = vars(owner)
        _, before, _ = self._blocked.get(id(owner), (attributes, {}, None))
        standing = {**before}
        self._blocked[id(owner)] = attributes, standing, None
        for method, kinds in blocks.items():
            blocked = attributes.get(method, _MISSING)
            if type(blocked) is not Blocked or blocked.is_of_another(owner):
                blocked = Blocked(owner, method, blocked, {self._hold: kinds})
            elif self._hold not in blocked.needs and not blocked.missing():  # somebody has kept it and put it back
                blocked = Blocked(owner, method, blocked.before, {self._hold: kinds})
            standing[method] = blocked  # first of all, so that whatever interrupts this can be made up for
            if blocked.needs.get(self._hold) != kinds:
                blocked.need({**blocked.needs, self._hold: kinds})
            attributes[method] = blocked

    def _unblock(self, owner_id: int, staying: Collection[str]) -> None:
        """Take away what blocks methods of an owner, but for some; others that need it keep it."""
        attributes, standing, post = self._blocked[owner_id]
        hold = self._hold
        if not staying and post is not None and post.standing is standing and _are_there(standing, attributes):
            for method in standing:  # all of it this guard's alone, as it mostly is
                del attributes[method]
            del self._blocked[owner_id]
            return
        for method, blocked in standing.items():
            needs = blocked.needs
            if method in staying or hold not in needs:
                continue
            if len(needs) > 1 or attributes.get(method) is not blocked:  # or somebody has put something there
                blocked.need({each: kinds for each, kinds in needs.items() if each is not hold})
            elif blocked.before is _MISSING:
                del attributes[method]
            else:
                attributes[method] = blocked.before
        if staying:
            self._blocked[owner_id] = attributes, {m: standing[m] for m in standing if m in staying}, None
        else:
            del self._blocked[owner_id]


class _Post:
    """Where a guard stands: one for each of its calls, with what it puts up at the owner again and again.

    Attributes:
        candidates: what is to be blocked there.
        standing: by method, what stands there. Emptied when something of it comes to need anything else
            (`Blocked.need`): then what still stands has to be looked at one by one, and is made anew the next time.
    """

    __slots__ = ("__weakref__", "candidates", "standing")

    def __init__(self, candidates: _Candidates) -> None:
        self.candidates = candidates
        self.standing: Mapping[str, Blocked] = {}

    def fill(self, owner: object, hold: _Hold) -> Mapping[str, Blocked]:
        """Make what is to stand there, at an instance that has only the methods of its class.

        It is kept if that does not keep the instance.
        """
        post = weakref.ref(self)  # no cycle: some trainers collect garbage seldom
        made = {m: Blocked(owner, m, _MISSING, {hold: kinds}, post) for m, kinds in self.candidates.certain.items()}
        if _weak_reference(owner) is not None:
            self.standing = made
        return made


class _Formation(NamedTuple):
    """All posts of a guard, with what has to be the same for it to take them again. Keeps no owner, and no class.

    Attributes:
        owners: in the order of the calls; None for those that cannot be referred to weakly, at whose posts nothing is
            kept.
        classes: of each.
        tables: of each.
        candidates: what is to be blocked on instances of a class, for each class and table that there is.
        posts: of each.
    """

    owners: Sequence[weakref.ref[object] | None]
    classes: Sequence[weakref.ref[type]]
    tables: Sequence[CallTable]
    candidates: Sequence[tuple[weakref.ref[type], CallTable, _Candidates]]
    posts: Sequence[_Post]

    @classmethod
    def of(cls, calls: Sequence[GuardedCalls], away: Set[StateKind]) -> _Formation:
        """Posts at which nothing has stood yet."""
        owners = [owner for owner, _ in calls]
        tables = [table for _, table in calls]
        keys = [(type(owner), id(table)) for owner, table in calls]
        found = {
            key: (weakref.ref(key[0]), table, _candidates(key[0], table, away))
            for key, table in dict(zip(keys, tables, strict=True)).items()
        }
        posts = [_Post(found[key][2]) for key in keys]
        return cls(_weak_references(owners), _classes(owners), tables, [*found.values()], posts)

    def is_for(self, calls: Sequence[GuardedCalls], away: Set[StateKind]) -> bool:
        """Whether it is the formation of these calls, and their classes have the methods that they had."""
        owners = [owner for owner, _ in calls]
        return (
            _are_same(_weak_references(owners), self.owners)
            and _are_same(_classes(owners), self.classes)
            and _are_same([table for _, table in calls], self.tables)
            and all(_candidates(cast("type", ref()), table, away) == found for ref, table, found in self.candidates)
        )


def _are_same(these: Sequence[object], those: Sequence[object]) -> bool:
    """Whether these are those, one by one."""
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _are_there(standing: Mapping[str, Blocked], attributes: Mapping[str, object]) -> bool:
    """Whether all of it is where it was put; asked by identity, as a proxy may be equal to what it stands around."""
    return all(map(operator.is_, map(attributes.get, standing), standing.values()))


def _classes(owners: Iterable[object]) -> Sequence[weakref.ref[type]]:
    return [*map(weakref.ref, map(type, owners))]


def _weak_references(owners: Sequence[object]) -> Sequence[weakref.ref[object] | None]:
    """The same objects for the same owners, for as long as these live; None for what has none."""
    try:
        return [*map(weakref.ref, owners)]
    except TypeError:
        return [*map(_weak_reference, owners)]


def _weak_reference(owner: object) -> weakref.ref[object] | None:
    try:
        return weakref.ref(owner)
    except TypeError:
        return None


def _remove(hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
    while hooks:
        hooks.pop().remove()


_EMPTY = _Formation((), (), (), (), ())

_REPLACING = process_lock()
"""Held while blocks are put up and taken down: guards of several managers share those of one trainer."""


_Blocks = Mapping[str, frozenset[StateKind]]
"""Methods that a guard is to block, and the kinds that each of them needs."""


class _Candidates(NamedTuple):
    """What is to be blocked on instances of a class.

    Attributes:
        certain: methods that every instance has.
        possible: those that an instance may have.
        are_certain: whether an instance has the others only as attributes of its own, and not through a `__getattr__`.
    """

    certain: _Blocks
    possible: _Blocks
    are_certain: bool

    def on(self, owner: object) -> _Blocks:
        """What is to be blocked on one of them."""
        attributes = vars(owner)
        found = {
            method: kinds
            for method, kinds in self.possible.items()
            if attributes.get(method) is not None or (not self.are_certain and hasattr(owner, method))
        }
        return {**self.certain, **found}


def _candidates(owner: type, calls: CallTable, away: Set[StateKind]) -> _Candidates:
    """What of a table is to be blocked on instances of a class: asked once, since a model has hundreds of each."""
    blocks = {method: kinds for method, kinds in calls.items() if not kinds.isdisjoint(away)}
    certain = {m: kinds for m, kinds in blocks.items() if getattr(owner, m, None) is not None or m == _DEEPCOPY}
    lookup = getattr(owner, "__getattr__", None)
    return _Candidates(
        certain,
        {method: kinds for method, kinds in blocks.items() if method not in certain},
        are_certain=lookup is None or lookup is torch.nn.Module.__getattr__,  # which finds no methods
    )


def _union(one: _Blocks, other: _Blocks) -> _Blocks:
    """All that one or the other blocks, with the kinds of both."""
    return {**one, **other, **{method: one[method] | other[method] for method in one.keys() & other.keys()}}


_OF_FUNCTIONS = ("__module__", "__name__", "__qualname__", "__doc__")
"""Attributes of a function that what stands in its place has as well."""

_NOTHING: frozenset[StateKind] = frozenset()


def _reference(owner: object) -> Callable[[], object]:
    """How to get at an instance without holding it; one that cannot be referred to weakly is held."""
    return _weak_reference(owner) or (lambda: owner)


class Blocked:
    """Stands where a method was; calling it raises, or waits if what it needs is on its way back.

    Does not hold the instance: a guard keeps this from move to move, and what a trainer drops meanwhile has to go.

    Attributes:
        before: the instance's own attribute of that name, which comes back at the end.
        needs: the kinds that the method needs, by the guard that blocks it. Replaced and never changed, as other
            threads may be calling this.
    """

    __slots__ = ("_method", "_owner_ref", "_post", "before", "needs")

    def __init__(
        self,
        owner: object,
        method: str,
        before: object,
        needs: Mapping[_Hold, frozenset[StateKind]],
        post: weakref.ref[_Post] | None = None,
    ) -> None:
        self._owner_ref = _reference(owner)
        self._method = method
        self._post = post
        self.before = before
        self.needs = needs

    @property
    def _owner(self) -> object:
        owner = self._owner_ref()
        if owner is None:
            raise ReferenceError(f"{self._method} was taken from an object that is gone; hold the object as well")
        return owner

    def is_of_another(self, owner: object) -> bool:
        """Whether it was made for another instance than this one, to which somebody has given it."""
        return self._owner_ref() is not owner

    def need(self, needs: Mapping[_Hold, frozenset[StateKind]]) -> None:
        """Replace what it needs: it is no longer what it was made as, and the post of some guard is told."""
        post = None if self._post is None else self._post()
        if post is not None:
            post.standing = {}
        self.needs = needs

    def missing(self) -> Mapping[_Hold, frozenset[StateKind]]:
        """What is away of what it needs, by the guard that says so."""
        missing = {hold: kinds & hold.gate.away for hold, kinds in self.needs.items()}
        return {hold: kinds for hold, kinds in missing.items() if kinds}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._method in READING_CALLS and all(hold.gate.is_read_here for hold in self.missing()):
            return self._original()(*args, **kwargs)
        errors = [hold.gate.wait(kinds) for hold, kinds in self.needs.items()]
        missing = self.missing()
        if not missing:  # all has arrived
            return self._original()(*args, **kwargs)
        what = f"{_READABLE.get(self._method, self._method)} of {type(self._owner).__name__}"
        kinds = _NOTHING.union(*missing.values())
        cause = next(filter(None, errors), None)
        is_lost = any(hold.gate.is_lost for hold in missing)
        return _refuse(what, kinds, cause, is_lost=is_lost, reads=self._method in READING_CALLS)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refused, as the copy of its owner would be: it cannot stand in front of a method of that."""
        raise OffloadedError(
            f"{type(self._owner).__name__} cannot be copied or pickled while state is away. Call manager.onload() first"
        )

    def __getattr__(self, name: str) -> Any:
        """Attributes that others keep on methods: so does a scheduler, which marks the `step` that it has wrapped."""
        if name == "__func__":
            return self._called_as_function
        if name in self.__slots__ or (name[:2] == "__" and name not in _OF_FUNCTIONS):
            raise AttributeError(f"what stands in front of a method while state is away has no {name}")
        try:
            return getattr(self._original(), name)
        except ReferenceError as error:
            raise AttributeError(str(error)) from error

    @property
    def _called_as_function(self) -> Callable[..., Any]:
        """What a wrapper around the method calls with the instance first; blocked for as long as this is."""

        @functools.wraps(self._original(), assigned=_OF_FUNCTIONS, updated=())
        def function(_owner: object, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return function

    def _original(self) -> Callable[..., Any]:
        """What stands where this stood; looked up past a wrapper that somebody may have put around this meanwhile."""
        if self._method == _DEEPCOPY:  # which few have themselves
            return partial(copy.deepcopy, self._owner)
        if self.before is not _MISSING:
            return cast("Callable[..., Any]", self.before)
        owner = type(self._owner)
        for base in owner.__mro__:
            if self._method in vars(base):
                found: Callable[..., Any] = vars(base)[self._method].__get__(self._owner, owner)
                return found
        return cast("Callable[..., Any]", getattr(self._owner, self._method))  # by a `__getattr__`


def unblocked(attribute: object) -> object:
    """What an instance had of its own where a guard has put something, or None; anything else is what it is."""
    if type(attribute) is not Blocked:
        return attribute
    return None if attribute.before is _MISSING else attribute.before


class _BackwardWatch:
    """A forward hook that stands at the entrance of the backward pass.

    It belongs to one module: a copy or a pickle of the module gets something that does nothing in its place, and that
    can be loaded where megastow is not installed.
    """

    def __init__(self, gate: _Gate) -> None:
        self._gate = gate

    def __call__(self, _module: torch.nn.Module, _inputs: object, output: object) -> None:
        if torch.compiler.is_compiling():  # a graph cannot contain it
            return
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:  # on a leaf (a parameter that is an output too) the hook would stay for good
                tensor.register_hook(self._on_gradient)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, returns None

    def _on_gradient(self, _gradient: torch.Tensor) -> None:
        if self._gate.away & _BACKWARD_KINDS:
            error = self._gate.wait(_BACKWARD_KINDS)
            if missing := self._gate.away & _BACKWARD_KINDS:
                _refuse("backward", missing, error, is_lost=self._gate.is_lost)


_DEEPCOPY = "__deepcopy__"
COPY_METHODS = (_DEEPCOPY, "__reduce_ex__")
"""Where `copy.deepcopy`, `pickle` and `torch.save` enter an object."""


READING_CALLS = frozenset(
    {
        "state_dict",
        "sharded_state_dict",
        "state_dict_for_save_checkpoint",
        "save_parameter_state",
        "get_parameter_state",
        "get_parameter_state_dp_zero",
        "get_parameter_state_fs_bucket_space",
        "get_parameter_state_dp_reshardable",
    }
)
"""Guarded calls that read state and change nothing, in all generations: what `MemoryManager.on_host` is for."""


def module_calls(modules: Iterable[torch.nn.Module]) -> Iterator[GuardedCalls]:
    """What reads the weights of modules: their calls, their state, and moving or casting them."""
    for module in modules:
        yield GuardedCalls(module, _MODULE_CALLS)


# `_call_impl` is `module(...)`, before any hook; `_compiled_call_impl` the same after `module.compile()`, and None if
# it was not compiled; `_apply` is behind to, cuda, cpu, half and share_memory.
_MODULE_CALLS = call_table(
    ((StateKind.WEIGHTS,), "_call_impl _compiled_call_impl forward _apply"),
    ((StateKind.WEIGHTS,), "state_dict load_state_dict sharded_state_dict state_dict_for_save_checkpoint"),
    ((StateKind.WEIGHTS,), " ".join(COPY_METHODS)),
    ((StateKind.GRAD_BUFFERS,), "zero_grad"),
)

TORCH_OPTIMIZER_CALLS = call_table(
    (ALL_KINDS, f"step {' '.join(COPY_METHODS)}"),
    ((StateKind.GRAD_BUFFERS,), "zero_grad"),
    ((StateKind.OPTIMIZER_STATES,), "state_dict load_state_dict"),
)
"""What the methods of `torch.optim.Optimizer` read or write."""

_BACKWARD_KINDS = frozenset({StateKind.WEIGHTS, StateKind.GRAD_BUFFERS})


_READABLE = {
    "_call_impl": "a call",
    "_compiled_call_impl": "a call",
    "_apply": "moving or casting",
    "__deepcopy__": "a copy",
    "__reduce_ex__": "pickling",
}


def _refuse(
    what: str, missing: Collection[StateKind], cause: BaseException | None, *, is_lost: bool, reads: bool = False
) -> NoReturn:
    kinds = [k for k in StateKind if k in missing]
    needs = f"{what} needs {', '.join(kinds)}, which {'are' if len(kinds) > 1 else 'is'}"
    if is_lost:
        raise OffloadedError(
            f"{needs} offloaded and lost: the manager was closed with discard=True. Make a new model, and load a "
            "checkpoint"
        ) from cause
    arguments = ", ".join(repr(k.value) for k in kinds)
    advice = f"Call manager.onload({arguments}) first, or leave the `with manager.offloaded()` block"
    if reads:
        advice += "; to read it in host memory, give the function itself to manager.on_host"
    raise OffloadedError(f"{needs} offloaded. {advice}") from cause


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors in what a module returned, however nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name, None))
