"""Tensors that refuse to be written to.

torch has no flag for it. An inference tensor will not do: an in-place operation on one raises when it has written
already, writes through `detach()` do not raise at all, nor does anything in `torch.inference_mode()`. So this is a
subclass that looks at every operation before it begins. Whatever computes gives ordinary tensors; whatever gives
another view of the same memory gives one that refuses as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch.utils._mode_utils import no_dispatch

from megastow.errors import ReadOnlyError


class ReadOnlyTensor(torch.Tensor):
    """A tensor on memory that is not to be changed; in everything else as an ordinary one.

    Saved, pickled and copied, it is an ordinary tensor. Its array (`numpy`) is read-only too. Nobody watches a tensor
    that was given its memory (`other.data = this`, `torch.from_numpy` of the array), nor what goes by
    `untyped_storage` or `data_ptr`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def over(tensor: torch.Tensor) -> ReadOnlyTensor:
        """One on the memory of an ordinary tensor, which must require no gradient."""
        with no_dispatch():
            made: ReadOnlyTensor = torch.Tensor._make_subclass(ReadOnlyTensor, tensor)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation that only reads; see the note of the module."""
        if torch.is_inference_mode_enabled():  # in which torch 2.4 cannot view a dtype as another
            with torch.inference_mode(False), torch.no_grad():
                return cls.__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        if _read_only(tuple(writes_to(func, args, kwargs))):
            _refuse(str(func))
        memory = {_storage_id(tensor) for tensor in _read_only((args, tuple(kwargs.values())))}
        with no_dispatch():
            return _kept(func(*args, **kwargs), memory)

    def ordinary(self) -> torch.Tensor:
        """An ordinary tensor on the same memory, for what only reads."""
        with no_dispatch():
            return self.as_subclass(torch.Tensor)

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array on the same memory."""
        array = self.ordinary().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """The elements, in nested lists."""
        return self.ordinary().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.ordinary(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.ordinary().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied: torch.Tensor = copy.deepcopy(self.ordinary(), memo)
        memo[id(self)] = copied
        return copied

    def apply_(self, *_: object) -> NoReturn:
        """Refused."""
        _refuse("apply_")

    map_ = map2_ = apply_  # type: ignore[assignment]

    def __dlpack__(self, *_: object, **__: object) -> NoReturn:
        """Refused: what is handed over by DLPack can be written to."""
        _refuse("whoever takes it over by DLPack")


def writes_to(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments that an operation may write to: those that it declares, and all of what does not declare any.

    Args:
        func: an operation of the dispatcher.
        args: its positional arguments.
        kwargs: its other arguments.

    Yields:
        Tensors, and lists of tensors.
    """
    declares_nothing = "c10d" in func.namespace  # collectives
    takes_memory_over = func._schema.name == "aten::set_"
    for index, argument in enumerate(func._schema.arguments):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written or declares_nothing or takes_memory_over:
            yield args[index] if index < len(args) else kwargs.get(argument.name)


def _read_only(value: Any) -> list[ReadOnlyTensor]:
    """Those of us in nested arguments."""
    if isinstance(value, ReadOnlyTensor):
        return [value]
    return [found for item in value for found in _read_only(item)] if isinstance(value, (list, tuple)) else []


def _kept(value: Any, memory: set[int]) -> Any:
    """A result, with its tensors on our memory made read-only."""
    if isinstance(value, torch.Tensor):
        ours = value.layout is torch.strided and _storage_id(value) in memory
        return ReadOnlyTensor.over(value) if ours and not isinstance(value, ReadOnlyTensor) else value
    return type(value)(_kept(item, memory) for item in value) if isinstance(value, (list, tuple)) else value


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _refuse(what: str) -> NoReturn:
    raise ReadOnlyError(
        f"{what} would write to a view on offloaded state, which is the only copy of it. Nothing was written. Clone "
        "the view first, or onload and write to the state itself"
    )
