"""Who holds an object: the ways up from it to something that a person can name, found with Python's garbage collector.

[Note: looking without touching]
What is looked at belongs to others, and may be in any state. So no code of theirs runs: types are asked with `type`,
attributes are read from instance dictionaries and slots, never by name, nothing is compared but identities, and of a
value nothing is printed but the name of its type. Nothing is kept alive either: a search holds what it has met in one
dictionary, and what it returns is text.

[Note: what the collector does not see]
The locals of running functions are in no object, and are asked for frame by frame. What only C++ holds (a tensor that
an autograd graph has saved) has no referrer at all. What is in the collector's permanent generation (`gc.freeze`) is
not looked at.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
import time
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

MOST_HOPS = 40
"""How far up a way is followed: a module of a deep model is three hops from the one that it is in."""

MOST_OBJECTS = 20_000
"""How many objects a search meets at most."""

MOST_SECONDS = 20.0
"""How long a search goes on at most, but for the hop that it is at. Other ranks may be waiting for this one."""

MOST_OWNERS = 4
"""How many of those that hold an object are named; as many more may hold it."""

_MOST_AT_A_TIME = 256
"""How many objects are asked after in one pass over the heap."""

OwnerKind = Literal["global", "class", "local", "closure", "function", "object", "garbage", "unseen"]

Links = Mapping[int, Sequence[tuple[int, str]]]
"""What C++ holds, where it can be told: identity of an object, to identities of its holders and what they call it."""

_PACKAGE = f"{Path(__file__).parent}{os.sep}"


@dataclass(frozen=True)
class Owner:
    """One way by which an object is held.

    Attributes:
        kind: Where the way begins: a global of a module, an attribute of a class, a local of a function, a variable in
            a closure, or what else a function keeps; an object that nothing was found above of; garbage in a reference
            cycle; or nothing that Python shows.
        path: The way down to the object: names, keys and indices, with `>` before each object whose attribute is next.
            Empty if unseen.
        place: Where to look for the beginning, in words.
    """

    kind: OwnerKind
    path: str
    place: str

    def __str__(self) -> str:
        return f"{self.path} ({self.place})" if self.path else self.place


UNSEEN = Owner("unseen", "", "held by C++ (an autograd graph, or an extension), or on the stack of a running function")


class OwnerSearch:
    """Looks for the owners of some objects.

    Each hop up is one pass over the heap, for all of them: 0.2 s for a million objects, or a second where hundreds are
    asked after. The interpreter's lock is held for as long as a pass takes.
    """

    def __init__(self, met: dict[int, Any], links: Links, hidden: Iterable[object] = ()) -> None:
        """Begin with nothing but the objects themselves.

        Args:
            met: what is asked after, and whatever `links` names, by identity. The search's own from here on, and the
                only container of ours that may hold any of it, besides those hidden.
            links: who holds what in C++.
            hidden: containers of ours that are no owners.
        """
        self._running, self._variables = _look_at_running_functions()
        self._met = met
        self._links = links
        self._hidden = {id(met), *map(id, hidden), *self._running}
        self._holders: dict[int, list[int]] = {}
        self._climbed: set[int] = set()
        self._globals = _module_dictionaries()

    def find(self, targets: Collection[int]) -> dict[int, tuple[Owner, ...]]:
        """The owners of each of `targets` (identities), the first few; `UNSEEN` alone if there are none.

        None at all for those that a search that took too long has not come to.
        """
        deadline = time.monotonic() + MOST_SECONDS
        before = len(self._met)
        for _ in range(MOST_HOPS):
            ends = self._open_ends(targets, deadline)
            if not ends or len(self._met) - before > MOST_OBJECTS or time.monotonic() > deadline:
                break
            self._climb(ends[:_MOST_AT_A_TIME])
        deadline = max(deadline, time.monotonic() + MOST_SECONDS / 4)  # to name what was found
        return {target: self._owners(target) if time.monotonic() < deadline else () for target in targets}

    # --- climbing ------------------------------------------------------------------------------------------------

    def _open_ends(self, targets: Iterable[int], deadline: float) -> list[int]:
        """What has not been asked after yet, on ways that have not come to a beginning; nearest first."""
        ends: dict[int, None] = {}
        for target in targets:
            if time.monotonic() > deadline:
                break
            if target not in self._climbed:
                ends[target] = None
            for holder in self._holders.get(target, ())[:MOST_OWNERS]:
                way, reached = self._way_up(holder, target)
                if not self._is_beginning(way[0]):
                    ends.update((key, None) for key in reached if key not in self._climbed)
        return list(ends)

    def _climb(self, keys: Sequence[int]) -> None:
        """One hop up from each of `keys`."""
        wanted = set(keys)
        held = [self._met[key] for key in keys]
        for holder in gc.get_referrers(*held):
            if holder is not held and id(holder) not in self._hidden and not self._is_running(holder):
                self._met[id(holder)] = holder
                if _is_ours(holder):  # it has a way to everything, by the manager, and names nothing
                    self._climbed.add(id(holder))
                for key in wanted.intersection(map(id, gc.get_referents(holder))):
                    self._holders.setdefault(key, []).append(id(holder))
        for key in keys:
            self._holders.setdefault(key, []).extend(parent for parent, _ in self._links.get(key, ()))
        self._climbed |= wanted

    def _way_up(self, start: int, target: int) -> tuple[list[int], Collection[int]]:
        """The shortest way from a beginning down by `start` to `target`, and all that was reached in looking for it.

        If no beginning was found yet, the way from the nearest object that is more than a container or a tensor.
        """
        below: dict[int, int] = {start: target}
        queue = deque([start])
        named = None
        while queue:
            key = queue.popleft()
            if self._is_beginning(key):
                return _way_down(key, below, target), below
            if named is None and not issubclass(type(self._met[key]), (*_CONTAINERS, torch.Tensor)):
                named = key
            for holder in self._holders.get(key, ()):
                if holder not in below and holder != target:
                    below[holder] = key
                    queue.append(holder)
        return _way_down(start if named is None else named, below, target), below

    def _is_running(self, holder: Any) -> bool:
        """Whether it is the coroutine or generator of a function that is running: its variables are known already."""
        return type(holder) in _SUSPENDABLE and id(_frame_of(holder)) in self._running

    def _is_beginning(self, key: int) -> bool:
        return key in self._variables or key in self._globals or issubclass(type(self._met[key]), _BEGINNINGS)

    # --- naming --------------------------------------------------------------------------------------------------

    def _owners(self, target: int) -> tuple[Owner, ...]:
        found = [Owner("local", name, place) for name, place in self._variables.get(target, ())]
        for holder in self._holders.get(target, ())[:MOST_OWNERS]:
            way, _ = self._way_up(holder, target)
            found.append(self._describe(way[0], [self._met[key] for key in way]))
        if not found and target in self._climbed:
            return (UNSEEN,)
        return tuple(dict.fromkeys(found))[:MOST_OWNERS]

    def _describe(self, key: int, chain: Sequence[Any]) -> Owner:
        """What is at the beginning of a chain in which each object holds the next, and the path from there."""
        top = chain[0]
        if key in self._globals:
            module = self._globals[key]
            return Owner("global", self._path(f"{module}.{_key_in(top, chain[1])}", chain[1:]), f"a global of {module}")
        if issubclass(type(top), type):
            name = f"{_class_attribute(top, '__module__')}.{class_name(top)}"
            return Owner("class", self._path_from(name, chain), "an attribute of a class")
        if issubclass(type(top), types.ModuleType):
            return Owner("global", self._path_from("module", chain), "a global of a module that is not in sys.modules")
        if type(top) is types.FunctionType:
            return self._of_function(top, chain)
        if type(top) in _WITH_FRAMES:
            return self._of_frame(top, chain)
        if key in self._variables:
            name, place = self._variables[key][0]
            return Owner("local", self._path(name, chain), place)
        place = "kept by megastow" if _is_ours(top) else f"nothing was found above the {class_name(type(top))}"
        return Owner("object", self._path("", chain), place)

    def _of_function(self, function: types.FunctionType, chain: Sequence[Any]) -> Owner:
        name = function.__qualname__
        if function.__closure__ is chain[1] and len(chain) > 3:  # the function, its cells, one of them, what is in it
            index = next(i for i, cell in enumerate(function.__closure__) if cell is chain[2])
            variable = function.__code__.co_freevars[index]
            return Owner("closure", self._path(variable, chain[3:]), f"in the closure of {name}")
        for attribute in ("__defaults__", "__kwdefaults__", "__globals__"):
            if getattr(function, attribute) is chain[1]:
                return Owner("function", self._path(f"{name}.{attribute}", chain[1:]), "kept by a function")
        return Owner("function", self._path_from(name, chain), "an attribute of a function")

    def _of_frame(self, owner: Any, chain: Sequence[Any]) -> Owner:
        """A local of a function that is not running: of a generator, or kept by the traceback of an exception."""
        frame = owner if type(owner) is types.FrameType else _frame_of(owner)
        if type(chain[1]) is types.CellType and len(chain) > 2:  # of a variable that an inner function uses, too
            chain = chain[1:]
        name = None if frame is None else _name_of(_variables_of(frame), chain[1])
        place = type(owner).__name__ if frame is None else _place_of(frame)
        return Owner("local", self._path(name or "?", chain[1:]), f"{place}, which is not running now")

    def _path_from(self, name: str, chain: Sequence[Any]) -> str:
        """The path from something called `name`, whose attributes are in a dictionary that comes next."""
        if len(chain) > 2 and issubclass(type(chain[1]), dict):
            return self._path(f"{name}.{_key_in(chain[1], chain[2])}", chain[2:])
        return self._path(name, chain[1:])

    def _path(self, text: str, chain: Sequence[Any]) -> str:
        """The path along a chain, from something that `text` has named."""
        attributes: dict[str, Any] | None = None  # those of the object last met
        for holder, held in pairwise(chain):
            if attributes is not None and holder is attributes:
                text += f".{_key_in(attributes, held)}"
                continue
            if type(holder) not in _CONTAINERS or not text:
                text = f"{text} > {class_name(type(holder))}" if text else class_name(type(holder))
            attributes = _own_dictionary(holder)
            if held is not attributes:
                text += self._label(holder, held)
        return text

    def _label(self, holder: Any, held: Any) -> str:
        """What an object calls another that it holds; empty if that cannot be told."""
        for parent, label in self._links.get(id(held), ()):
            if parent == id(holder):
                return label
        if (place := _place_in(holder, held)) is not None:
            return place
        name = _name_of(_attributes_of(holder), held)
        return "" if name is None else f".{name}"


def _way_down(key: int, below: Mapping[int, int], target: int) -> list[int]:
    way = [key]
    while way[-1] != target:
        way.append(below[way[-1]])
    return way


_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set, frozenset, deque, types.CellType)
_SUSPENDABLE = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_WITH_FRAMES = (types.FrameType, *_SUSPENDABLE)
_BEGINNINGS = (types.ModuleType, type, types.FunctionType, *_WITH_FRAMES)


# --- where things begin ----------------------------------------------------------------------------------------------


def _module_dictionaries() -> dict[int, str]:
    """The names of all modules, by the identity of their globals."""
    found: dict[int, str] = {}
    for name, module in _items(sys.modules):
        if issubclass(type(module), types.ModuleType):
            found.setdefault(id(_own_dictionary(module)), name)
    return found


def _look_at_running_functions() -> tuple[set[int], dict[int, list[tuple[str, str]]]]:
    """The frames of all functions that are running, in every thread, and what their local variables hold.

    Holds no frame when it returns: one that is held by itself would stay, with all that it refers to.

    Returns:
        Identities of the frames; and identity of a value, to the variables that hold it: name, and which function's.
        Variables of ours are left out.
    """
    frames: set[int] = set()
    variables: dict[int, list[tuple[str, str]]] = {}
    threads: list[types.FrameType | None] = list(sys._current_frames().values())
    while threads:
        frame = threads.pop()
        handed: set[int] = set()  # frames that newer ones have in hand, as the callback of a tracer or profiler has
        while frame is not None:
            frames.add(id(frame))
            if not frame.f_code.co_filename.startswith(_PACKAGE):
                place = _place_of(frame)
                found = _variables_of(frame, is_watched=id(frame) in handed)
                handed.update(id(value) for _, value in found if type(value) is types.FrameType)
                for name, key in [(name, id(value)) for name, value in found]:
                    variables.setdefault(key, []).append((name, place))
                del found
            frame = frame.f_back
    return frames, variables


def _variables_of(frame: types.FrameType, *, is_watched: bool = False) -> list[tuple[str, Any]]:
    """The local variables of a function; a module has none, for they are its globals.

    Before Python 3.13 asking makes the frame keep a dictionary of them, which would keep the values alive. It is
    emptied, unless somebody else has it (`locals()` gives the same one) or a tracer or profiler, which writes it back.
    A dictionary that `locals()` has given earlier is brought up to date by it, as by any debugger.

    Args:
        frame: Of the function.
        is_watched: Whether a tracer or a profiler has it in hand.
    """
    if frame.f_locals is frame.f_globals:
        return []
    variables = frame.f_locals
    if issubclass(type(variables), dict):
        found = _items(variables)
    else:  # since Python 3.13; or what somebody has given to `exec`, whose methods are not ours to call
        found = list(variables.items()) if type(variables) is _LOCALS else []
    is_snapshot = type(variables) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED
    is_watched |= frame.f_trace is not None or sys.gettrace() is not None or sys.getprofile() is not None
    if is_snapshot and not is_watched and sys.getrefcount(variables) <= _REFERENCES_TO_A_SNAPSHOT:
        variables.clear()
    return found


def _kind_of_locals() -> type:
    return type(sys._getframe().f_locals)


_LOCALS = _kind_of_locals()

_REFERENCES_TO_A_SNAPSHOT = 3
"""The frame's, our variable's, and that of the call that counts them."""


def _frame_of(generator: Any) -> types.FrameType | None:
    """The frame of a generator, a coroutine or an asynchronous generator; None once it has ended."""
    for attribute, kind in (("gi_frame", types.GeneratorType), ("cr_frame", types.CoroutineType)):
        if type(generator) is kind:
            found: types.FrameType | None = getattr(generator, attribute)
            return found
    frame: types.FrameType | None = generator.ag_frame
    return frame


def _place_of(frame: types.FrameType) -> str:
    code = frame.f_code
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.11
    return f"local of {name}, {Path(code.co_filename).name}:{frame.f_lineno}"


# --- what things are called, without running anything (see [Note: looking without touching]) -------------------------


def _place_in(container: Any, held: object) -> str | None:
    """Where in a container an object is; None if it is in none, or not as an item."""
    kind = type(container)
    if kind is types.CellType:
        return ""
    if issubclass(kind, dict):
        for key, value in _items(container):
            if value is held:
                return f"[{_key_text(key)}]"
            if key is held:
                return ".keys()"
    for base in (list, tuple, deque):
        if issubclass(kind, base):
            items = list(base.__iter__(container))
            return next((f"[{index}]" for index, item in enumerate(items) if item is held), None)
    return "{}" if issubclass(kind, (set, frozenset)) else None


def _key_in(dictionary: dict[Any, Any], held: object) -> str:
    """The name by which a dictionary of attributes or globals has an object."""
    key = next((key for key, value in _items(dictionary) if value is held), None)
    return key if type(key) is str else "?"


def _key_text(key: object) -> str:
    is_plain = type(key) in (str, bool, type(None)) or (type(key) is int and key.bit_length() <= _MOST_BITS_OF_A_KEY)
    return repr(key)[:_MOST_OF_A_KEY] if is_plain else f"<{class_name(type(key))}>"


_MOST_OF_A_KEY = 60
_MOST_BITS_OF_A_KEY = 128


def _items(dictionary: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """What is in a dictionary now, whatever its class says of that.

    Neither of the two lists needs an allocation for an item, at which the collector could run finalizers that change
    the dictionary meanwhile; it may in between.
    """
    while True:
        keys, values = list(dict.keys(dictionary)), list(dict.values(dictionary))
        if len(keys) == len(values):
            return list(zip(keys, values, strict=True))


def _name_of(named: Iterable[tuple[str, object]], held: object) -> str | None:
    return next((name for name, value in named if value is held), None)


def _attributes_of(owner: Any) -> Iterator[tuple[str, Any]]:
    """What is in an object's dictionary and in its slots; of a class of C, in its members."""
    yield from _items(_own_dictionary(owner) or {})
    for base in _bases(type(owner)):
        for name, member in list(_class_dictionary(base).items()):
            if type(member) is types.MemberDescriptorType:
                try:
                    yield name, member.__get__(owner)
                except AttributeError:  # an empty slot
                    continue


def _own_dictionary(owner: Any) -> dict[str, Any] | None:
    """An object's `__dict__`, if that is a real one and no property."""
    for base in _bases(type(owner)):
        descriptor = _class_dictionary(base).get("__dict__")
        if descriptor is not None:
            is_real = type(descriptor) in (types.GetSetDescriptorType, types.MemberDescriptorType)
            found = descriptor.__get__(owner) if is_real else None
            return found if type(found) is dict else None
    return None


def _bases(cls: type) -> tuple[type, ...]:
    found: tuple[type, ...] = type.__dict__["__mro__"].__get__(cls)
    return found


def _is_ours(thing: object) -> bool:
    return _class_attribute(type(thing), "__module__").startswith(_OUR_MODULES)


_OUR_MODULES = f"{__name__.rpartition('.')[0]}."


def _class_dictionary(cls: type) -> Mapping[str, Any]:
    found: Mapping[str, Any] = type.__dict__["__dict__"].__get__(cls)
    return found


def _class_attribute(cls: type, name: str) -> str:
    found = _class_dictionary(cls).get(name)
    return found if type(found) is str else "builtins"


def class_name(cls: type) -> str:
    """What a class is called, whatever its metaclass says."""
    name: str = type.__dict__["__qualname__"].__get__(cls)
    return name
