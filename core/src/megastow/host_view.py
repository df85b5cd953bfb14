"""Tensors over what is in host memory, shaped like those whose bytes it holds; nothing is moved, and nothing copied.

[Note: how long a view shows the same]
For as long as it lives. Its memory stays mapped when its kind comes back and when the manager is closed, and an offload
does not write to memory that somebody still looks at: it takes new host memory, which costs the time and the bytes of a
first offload. So drop views before the next offload.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

import torch

from megastow.errors import InvalidArgumentError, InvalidTypeError, NotOnHostError, UnsupportedTensorError
from megastow.parked import Parked
from megastow.read_only import ReadOnlyTensor
from megastow.state import ALL_KINDS, Inventory, StateKind
from megastow.storages import storage_id


class HostViews:
    """Finds what is offloaded by the tensors that lie on it, and makes tensors over its bytes.

    Holds what it has lent while it lives itself: make it anew for each use.
    """

    def __init__(self, parked: Iterable[Parked]) -> None:
        """Look at what is offloaded now; of no use once anything has moved."""
        self._parked = {storage_id(entry.storage): entry for entry in parked}
        self._lent: dict[int, torch.UntypedStorage] = {}  # by the identity of the offloaded storage
        self._lent_ids: set[int] = set()

    def find(self, tensor: torch.Tensor) -> Parked | None:
        """What is offloaded under a tensor, whichever alias it is; None if that is on the device, or not ours.

        Raises:
            UnsupportedTensorError: a subclass that wraps other tensors, some of which are offloaded.
        """
        if hasattr(tensor, "__tensor_flatten__"):
            attributes, _context = tensor.__tensor_flatten__()
            if any(self.find(getattr(tensor, attribute)) for attribute in attributes):
                raise UnsupportedTensorError(
                    f"a {type(tensor).__qualname__} wraps other tensors, and is not read on the host itself. Use its "
                    f"inner ones ({', '.join(attributes)}), or onload it"
                )
            return None
        key = _storage_id(tensor)
        return None if key is None else self._parked.get(key)

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is offloaded, or lies on host memory that was lent here."""
        return self.find(tensor) is not None or _storage_id(tensor) in self._lent_ids

    def storage(self, entry: Parked) -> torch.UntypedStorage:
        """The bytes of an offloaded storage, in a storage of the same size on the host.

        Raises:
            NotOnHostError: they were not kept.
        """
        key = storage_id(entry.storage)
        if key not in self._lent:
            if entry.is_derived:
                raise NotOnHostError(
                    f"{entry.names[0]} ({entry.kind}) was released without a copy, to be rebuilt from main weights. To "
                    "look at it, onload it first, or make the manager without derive_weights"
                )
            if entry.host is None:
                raise NotOnHostError(
                    f"{entry.names[0]} ({entry.kind}) was released without a copy, and comes back as zeros. To look at "
                    "gradients while they are away, offload them with keep_grads=True"
                )
            if entry.share is not None:
                ranks = ", ".join(map(str, entry.peers))
                raise NotOnHostError(
                    f"{entry.names[0]} ({entry.kind}) is shared by ranks {ranks}, each of which keeps a part in its "
                    "host memory: onload it to read it, or make the manager without replicas=True"
                )
            lent = self._lent[key] = entry.host.lend()
            self._lent_ids.add(storage_id(lent))
        return self._lent[key]

    def tensor(self, tensor: torch.Tensor, entry: Parked) -> torch.Tensor:
        """An ordinary CPU tensor over the bytes of `tensor`, for operations that are watched: it can be written to."""
        with torch.inference_mode(False):
            return _like(tensor, self.storage(entry))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """A read-only CPU tensor like one that is covered, over the same bytes."""
        entry = self.find(tensor)
        storage = tensor.untyped_storage() if entry is None else self.storage(entry)
        with torch.inference_mode(False):
            return ReadOnlyTensor.over(_like(tensor, storage))


def _storage_id(tensor: torch.Tensor) -> int | None:
    """Identity of a tensor's storage; None if it has none of its own."""
    try:
        return storage_id(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError):  # a sparse tensor, or a subclass that wraps others
        return None


def _like(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    made = torch.empty(0, dtype=tensor.dtype, device="cpu")
    made = made.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    made = made.conj() if tensor.is_conj() else made
    return torch._neg_view(made) if tensor.is_neg() else made


# --- by name ---------------------------------------------------------------------------------------------------------


def host_tensor(views: HostViews, inventory: Inventory, wanted: str | torch.Tensor) -> torch.Tensor:
    """A view on what is offloaded under a tensor or a name of the inventory; see `MemoryManager.host_tensor`.

    Raises:
        NotOnHostError: it is on the device, or was not kept.
        InvalidArgumentError: no such state is known.
        InvalidTypeError: neither a name nor a tensor.
        UnsupportedTensorError: a subclass that wraps other tensors.
    """
    tensor = _named(inventory, wanted) if isinstance(wanted, str) else wanted
    if not isinstance(tensor, torch.Tensor):
        raise InvalidTypeError(f"a {type(wanted).__qualname__} was given; expected a tensor, or the name of one")
    if views.find(tensor) is not None:
        return views.view(tensor)
    for kind, name, known in _listed(inventory, transient=True):
        if known is tensor or _storage_id(known) == _storage_id(tensor) is not None:
            raise NotOnHostError(
                f"{name} ({kind}) is on the {tensor.device.type} device, not in host memory: use the tensor itself, or "
                f"offload {kind} first"
            )
    raise InvalidArgumentError(
        f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype} on {tensor.device} belongs to no state that this "
        "manager has offloaded"
    )


def host_state_dict(views: HostViews, inventory: Inventory, kind: StateKind) -> dict[str, torch.Tensor]:
    """Views on all lasting state that was offloaded with a kind, by name; see `MemoryManager.host_state_dict`.

    Raises:
        NotOnHostError: some of it was not kept.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for listed_as, name, tensor in _listed(inventory):
        entry = views.find(tensor)
        is_empty = entry is None and listed_as is kind and tensor.numel() == 0
        if id(tensor) in seen or not (is_empty or (entry is not None and entry.kind is kind)):
            continue
        seen.add(id(tensor))
        found[_free(name, found)] = torch.empty_like(tensor, device="cpu") if is_empty else views.view(tensor)
    return found


def _listed(inventory: Inventory, *, transient: bool = False) -> Iterator[tuple[StateKind, str, torch.Tensor]]:
    """The lasting state of an inventory, and the transient if asked, in the order in which kinds claim it.

    What is transient is not found by name while it is away: attributes of modules without memory are taken for emptied.
    """
    for kind in ALL_KINDS:
        for group in inventory.groups:
            if group.kind is kind and (transient or not group.transient):
                for name, tensor in group.tensors:
                    yield kind, name, tensor


def _named(inventory: Inventory, name: str) -> torch.Tensor:
    found = {id(tensor): tensor for _, known, tensor in _listed(inventory) if known == name}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise InvalidArgumentError(f"{len(found)} tensors are called {name!r}; give the tensor itself")
    near = difflib.get_close_matches(name, {known for _, known, _ in _listed(inventory)}, n=3, cutoff=0.5)
    raise InvalidArgumentError(
        f"no state is called {name!r}; {_either(near)}. Names are those of host_state_dict; for plain attributes of "
        "modules, give the tensor itself"
    )


def _either(names: Sequence[str]) -> str:
    return f"there is {' or '.join(map(repr, names))}" if names else "no name is like it"


def _free(name: str, taken: Iterable[str]) -> str:
    """A name that is not taken: adapters may give two tensors the same one, and none must be lost."""
    number = 1
    free = name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free
