"""Running a function that reads offloaded state, on the bytes in host memory: for the state dicts of trainers.

[Note: two modes]
A function mode stands where Python calls torch, and hands over tensors on host memory instead of those whose storage
was released: also to calls that read memory past the dispatcher (`numpy`, `tolist`, pickling, printing). Attributes,
shapes and hashes are left as they are, for state dicts are put together by the identity of parameters. A dispatch mode
stands below, where operations begin: it does the same for what reaches it from C++, and refuses whatever would write.
Both are modes of the calling thread.

[Note: what comes out]
Tensors on released storages and on lent memory are replaced by views in whatever the function returns. Dicts, lists,
tuples and objects with attributes (Megatron's ShardedTensor, ShardedObject, ShardedTensorFactory) are copied where
something in them is replaced, and never changed: a state dict may contain the trainer's own dicts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megastow.errors import OffloadedError
from megastow.host_view import HostViews
from megastow.read_only import writes_to

Result = TypeVar("Result")


def on_host(views: HostViews, function: Callable[[], Result], *, clone: bool) -> Result:
    """What `function` returns, reading host memory where state is offloaded; see `MemoryManager.on_host`."""
    with torch.no_grad(), _Operations(views), _Calls(views):
        result = function()
    return cast("Result", _Outcome(views, clone).of(result))


class _Calls(TorchFunctionMode):
    """Hands tensors on host memory to the functions of torch. See [Note: two modes]."""

    def __init__(self, views: HostViews) -> None:
        super().__init__()
        self._views = views

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ABOUT_THE_TENSOR:
            return func(*args, **(kwargs or {}))
        if name == "__set__":
            name = func.__self__.__name__
            if name != "data":
                return func(*args, **(kwargs or {}))
        if name in _WRITE_PAST_THE_DISPATCHER and self._views.covers(args[0]):
            _refuse(name)
        result = func(*_swapped(self._views, args), **_swapped(self._views, kwargs or {}))
        if name in _ARRAYS and self._views.covers(args[0]):
            result.flags.writeable = False
        return result


_ABOUT_THE_TENSOR = frozenset(
    {
        "__get__",
        "__hash__",
        "__len__",
        "dim",
        "element_size",
        "get_device",
        "is_complex",
        "is_contiguous",
        "is_floating_point",
        "ndimension",
        "nelement",
        "numel",
        "size",
        "storage_offset",
        "stride",
    }
)
"""What asks for attributes and identity, and is answered without memory."""

_WRITE_PAST_THE_DISPATCHER = frozenset({"apply_", "map_", "map2_", "data", "__dlpack__"})
"""What changes a tensor, or lets others do so, and the attribute that does when it is set: without an operation."""

_ARRAYS = frozenset({"numpy", "__array__"})
"""What gives an array on the memory of a tensor, which nobody watches; so it is made read-only."""


class _Operations(TorchDispatchMode):
    """Lets operations read host memory, and refuses what would write. See [Note: two modes]."""

    def __init__(self, views: HostViews) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._views = views

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            self._check(func, args, kwargs)
            args, kwargs = _swapped(self._views, args), _swapped(self._views, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        if any(map(self._is_covered, writes_to(func, args, kwargs))):
            _refuse(str(func), "Give collectives a clone. " if "c10d" in func.namespace else "")

    def _is_covered(self, value: object) -> bool:
        if isinstance(value, torch.Tensor):
            return self._views.covers(value)
        return isinstance(value, (list, tuple)) and any(map(self._is_covered, value))


def _swapped(views: HostViews, value: Any) -> Any:
    """Arguments with ordinary tensors on host memory in place of those that are offloaded."""
    if isinstance(value, torch.Tensor):
        entry = views.find(value)
        return value if entry is None else views.tensor(value, entry)
    if type(value) in (list, tuple):
        return type(value)(_swapped(views, item) for item in value)
    if type(value) is dict:
        return {key: _swapped(views, item) for key, item in value.items()}
    return value


def _refuse(what: str, hint: str = "") -> NoReturn:
    raise OffloadedError(
        f"{what} would write to a tensor that is offloaded, and manager.on_host only reads. {hint}To change state, "
        "call manager.onload() first"
    )


class _Outcome:
    """Replaces tensors in what a function has returned. See [Note: what comes out]."""

    def __init__(self, views: HostViews, clone: bool) -> None:
        self._views = views
        self._clone = clone
        self._done: dict[int, tuple[object, object]] = {}  # by identity: what was met, and what it became
        self._clones: dict[object, torch.Tensor] = {}  # by place and form: tied weights stay one

    def of(self, value: Any) -> Any:
        """The value itself, or a copy of it with views in it."""
        if id(value) not in self._done:
            self._done[id(value)] = (value, value)  # whatever leads back here finds it as it was
            self._done[id(value)] = (value, self._replaced(value))
        return self._done[id(value)][1]

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._sequence(value)
        if type(value).__name__ == "ndarray" and self._clone and not value.flags.writeable:
            return value.copy()
        return value if isinstance(value, _LEFT_ALONE) else self._object(value)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._views.covers(tensor):
            return tensor
        view = self._views.view(tensor)
        if not self._clone:
            return view
        form = (view.data_ptr(), view.dtype, view.shape, view.stride(), view.is_conj(), view.is_neg())
        with torch.inference_mode(False):
            if form in self._clones:
                return self._clones[form].detach()
            self._clones[form] = view.clone()
        return self._clones[form]

    def _mapping(self, value: Any) -> Any:
        found = {key: self.of(item) for key, item in value.items()}
        if all(found[key] is item for key, item in value.items()):
            return value
        copied = copy.copy(value)  # keeps the class, and attributes such as the `_metadata` of a state dict
        for key, item in found.items():
            copied[key] = item
        return copied

    def _sequence(self, value: Any) -> Any:
        found = [self.of(item) for item in value]
        if all(new is old for new, old in zip(found, value, strict=True)):
            return value
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)

    def _object(self, value: Any) -> Any:
        attributes = _attributes(value)
        found = {name: self.of(item) for name, item in attributes.items()}
        if all(found[name] is item for name, item in attributes.items()):
            return value
        copied = copy.copy(value)
        for name, item in found.items():
            object.__setattr__(copied, name, item)  # also where the class is frozen
        return copied


def _attributes(value: object) -> dict[str, Any]:
    """What an object keeps in its own dictionary and in slots."""
    slots = [name for base in type(value).__mro__ for name in _names(vars(base).get("__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if name[:2] != "__" and hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


_LEFT_ALONE = (type, type(torch), type(_refuse), type(len), torch.nn.Module, torch.optim.Optimizer)
"""What an outcome may contain and is no container of state: classes, modules, functions; and what is guarded."""
