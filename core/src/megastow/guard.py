"""While a kind is away, whatever would touch it raises `OffloadedError` instead of reading released memory.

Without a guard a use of released storage is a segmentation fault on the CPU, an illegal address on a GPU (which poisons
the CUDA context for good), or, for `state_dict` and `torch.save`, silently wrong.

A method is blocked by an attribute of the same name on the instance, which Python finds first; taking it away again
leaves the instance as it was. Managers that share an instance share the attribute: the last to let go takes it away.

Calls of a module are blocked at `_call_impl`, ahead of all hooks (Megatron's own forward pre-hooks gather parameters).
A backward pass through a graph made before the offload cannot be blocked that way: a gradient hook on the model's
outputs stands at its entrance.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from megastow.errors import OffloadedError
from megastow.state import StateKind

_MISSING = object()


@dataclass(frozen=True)
class GuardedCall:
    """A method that must not run while any of `kinds` is away.

    Attributes:
        owner: the instance.
        method: the method's name; a name that the instance does not have is passed over, except `__deepcopy__`, which
            Python looks for on every instance.
        kinds: what the method reads or writes.
    """

    owner: object
    method: str
    kinds: frozenset[StateKind]


CallTable = Mapping[str, frozenset[StateKind]]
"""Names of methods, and the kinds that each reads or writes."""


def call_table(*rows: tuple[Iterable[StateKind], str]) -> CallTable:
    """A table of calls from rows of kinds and the names, separated by spaces, of the methods that need them."""
    return {method: frozenset(kinds) for kinds, methods in rows for method in methods.split()}


def guarded(owner: object, calls: CallTable) -> Iterator[GuardedCall]:
    """The calls of a table, on one instance."""
    for method, kinds in calls.items():
        yield GuardedCall(owner, method, kinds)


class Guard:
    """Blocks and unblocks the guarded calls of one manager."""

    def __init__(self) -> None:
        self._token = object()  # who we are to a `Blocked` that we share; it keeps nothing of us alive
        self._blocked: list[tuple[dict[str, Any], str, Blocked]] = []
        self._away: set[StateKind] = set()  # shared with the hooks, which outlive us if nobody calls `close`
        self._is_settled = True
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def update(self, away: Set[StateKind], calls: Callable[[], Iterable[GuardedCall]]) -> None:
        """Block exactly those calls that need a kind that is away now; what interrupts it is made up for next time."""
        if self._is_settled and away == self._away:
            return
        needed = list(calls()) if away else []
        self._is_settled = False
        self._away.difference_update(self._away - away)
        self._away.update(away)
        self._unblock()
        for call in needed:
            missing = call.kinds & away
            if missing and (hasattr(call.owner, call.method) or call.method == "__deepcopy__"):
                self._block(call, missing)
        self._is_settled = True

    def watch_backward(self, modules: Iterable[torch.nn.Module]) -> None:
        """Check every backward pass that enters one of `modules` from its outputs, until `close`."""
        self._hooks += [module.register_forward_hook(_BackwardWatch(self._away)) for module in modules]

    def close(self) -> None:
        """Remove everything."""
        self._unblock()
        self._away.clear()
        while self._hooks:
            self._hooks.pop().remove()

    def _block(self, call: GuardedCall, missing: frozenset[StateKind]) -> None:
        attributes = vars(call.owner)
        blocked = attributes.get(call.method)
        if not isinstance(blocked, Blocked):
            blocked = Blocked(_describe(call.owner, call.method), attributes.get(call.method, _MISSING))
        self._blocked.append((attributes, call.method, blocked))
        blocked.missing[self._token] = blocked.missing.get(self._token, frozenset()) | missing
        attributes[call.method] = blocked

    def _unblock(self) -> None:
        while self._blocked:
            attributes, name, blocked = self._blocked[-1]
            blocked.missing.pop(self._token, None)
            if not blocked.missing and attributes.get(name) is blocked:  # not what somebody else has put there since
                if blocked.before is _MISSING:
                    del attributes[name]
                else:
                    attributes[name] = blocked.before
            self._blocked.pop()


class Blocked:
    """Stands where a method was; calling it raises.

    Attributes:
        before: the instance's own attribute of that name, which comes back at the end.
        missing: the kinds that are away, by the token of the guard that blocks.
    """

    def __init__(self, what: str, before: object) -> None:
        self._what = what
        self.before = before
        self.missing: dict[object, frozenset[StateKind]] = {}

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        _refuse(self._what, frozenset().union(*self.missing.values()))


class _BackwardWatch:
    """A forward hook that stands at the entrance of the backward pass.

    It belongs to one module: a copy or a pickle of the module gets something that does nothing in its place, and that
    can be loaded where megastow is not installed.
    """

    def __init__(self, away: Set[StateKind]) -> None:
        self._away = away

    def __call__(self, _module: torch.nn.Module, _inputs: object, output: object) -> None:
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:  # on a leaf (a parameter that is an output too) the hook would stay for good
                tensor.register_hook(self._on_gradient)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, returns None

    def _on_gradient(self, _gradient: torch.Tensor) -> None:
        missing = self._away & _BACKWARD_KINDS
        if missing:
            _refuse("backward", missing)


COPY_METHODS = ("__deepcopy__", "__reduce_ex__")
"""Where `copy.deepcopy`, `pickle` and `torch.save` enter an object."""


def module_calls(modules: Iterable[torch.nn.Module]) -> Iterator[GuardedCall]:
    """What reads the weights of modules: their calls, their state, and moving or casting them."""
    for module in modules:
        for method in _MODULE_METHODS:
            yield GuardedCall(module, method, frozenset({StateKind.WEIGHTS}))


_MODULE_METHODS = (
    "_call_impl",  # module(...), before any hook
    "_compiled_call_impl",  # the same after module.compile(); None if it was not compiled
    "forward",
    "state_dict",
    "load_state_dict",
    "sharded_state_dict",
    "state_dict_for_save_checkpoint",
    "_apply",  # to, cuda, cpu, half, share_memory
    *COPY_METHODS,
)

_BACKWARD_KINDS = frozenset({StateKind.WEIGHTS, StateKind.GRAD_BUFFERS})


_READABLE = {
    "_call_impl": "a call",
    "_compiled_call_impl": "a call",
    "_apply": "moving or casting",
    "__deepcopy__": "a copy",
    "__reduce_ex__": "pickling",
}


def _describe(owner: object, method: str) -> str:
    return f"{_READABLE.get(method, method)} of {type(owner).__name__}"


def _refuse(what: str, missing: Collection[StateKind]) -> NoReturn:
    kinds = [k for k in StateKind if k in missing]
    arguments = ", ".join(repr(k.value) for k in kinds)
    raise OffloadedError(
        f"{what} needs {', '.join(kinds)}, which is offloaded. "
        f"Call manager.onload({arguments}) first, or leave the `with manager.offloaded()` block"
    )


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
