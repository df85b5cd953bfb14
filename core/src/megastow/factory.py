"""How a manager is made: arguments are checked, an adapter is chosen, and ranks find each other."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from megastow import arguments, machine
from megastow.agreement import DEFAULT_AGREE_SECONDS, NOTES, Agreement, Ballot, Call, agreement_of
from megastow.derived import derivable_buffers_of
from megastow.disk import DiskFolder
from megastow.engine import DEFAULT_BUCKET_BYTES
from megastow.errors import InvalidArgumentError, InvalidTypeError
from megastow.manager import MemoryManager
from megastow.registry import choose_adapter
from megastow.replicas import Circle
from megastow.tiers import HOST_MEMORY, HostMemory
from megastow.transport import DEFAULT_CHUNK_BYTES

logger = logging.getLogger(__name__)


def create_memory_manager(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: Any = None,
    *,
    adapter: str | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    host_memory: HostMemory = "pinned",
    disk_folder: str | os.PathLike[str] | None = None,
    verify: Literal["none", "digest"] = "none",
    derive_weights: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    agree_timeout: float = DEFAULT_AGREE_SECONDS,
    replicas: bool = False,
) -> MemoryManager:
    """Make the manager of a trainer's (or any module's) device memory.

    Nothing is moved, and no host memory is taken, before the first call that needs it. The one thing that changes is a
    forward hook on the innermost modules, which protects backward passes while state is away; `close` removes it.

    Args:
        model: Megatron's DistributedDataParallel chunk or a list of them (virtual pipeline), or a plain module.
        optimizer: what `get_megatron_optimizer` returned, or a torch optimizer over a plain module, or None.
        adapter: use this adapter instead of the one that accepts; for a Megatron version that no adapter knows yet.
        bucket_bytes: size of the device buckets that small tensors are packed into, and the extra device memory that
            packing needs, once.
        chunk_bytes: the most that one copy carries.
        host_memory: where copies are kept. "pinned": page-locked memory. "pageable": memory that is not page-locked.
            "disk": files. "auto": page-locked memory as far as the host has room for all local ranks, and files for the
            rest, optimizer states first, then main weights, then weights; memory that cannot be page-locked stays
            pageable. All but "pinned" copy through a page-locked buffer of at most 64 MiB.
        disk_folder: an existing folder on a disk, where files are made in a folder of this user's own; None for
            $TMPDIR, or /var/tmp. The files have no names, are readable by this user only, and go with the process.
        verify: "digest" computes 64 bits for each storage that is kept, on the device, before it leaves and when it is
            back; a difference raises `CorruptionError`. Runs beside the copies, and takes 8 MiB of device memory more
            in each move. What it catches is told in `megastow.digest`.
        derive_weights: do not keep weights that are a cast of main weights; rebuild them on the device when they come
            back, with main weights or after them. Each offload of weights proves it first, bit by bit (one pass over
            weights and main weights at the device's own speed, and 24 MiB of device memory); what fails the proof is
            kept, and reports say so. Needs an adapter that can tell (`mcore`, `legacy_v3`), and a `group` that contains
            the ranks that gather parameters together, where there are several: an onload of weights all-gathers over
            Megatron's own groups. While one is under way in the background, use none of those.
        group: the ranks that move together: `torch.distributed.group.WORLD`, or any group that this process is in. This
            call and every offload and onload is then collective over the group, and happens on all of its ranks or on
            none. Managers of a group are made in the same order on all of its ranks. None: each rank on its own.
        agree_timeout: seconds that ranks wait for each other at the start and before the end of such a call; with the
            default well under NCCL's. It has to cover what ranks are apart when they call.
        replicas: of what is the same on several ranks of a host (data-parallel weights; without the distributed
            optimizer all lasting state), each keeps only its part in host memory. On the way back each brings its part
            over its own link, and an all-gather rebuilds the whole in place: NCCL on a GPU, with a communicator of its
            own; gloo on the CPU. It takes no device memory beside NCCL's own. The ranks move together, as with `group`,
            which is `torch.distributed.group.WORLD` if it is not given. Digests (see `verify`) tell in every offload
            whether the bytes really are the same; of what is not, each rank keeps all, and the report says so. What is
            shared is released at the end of an offload, when all ranks have confirmed it. A rank that is lost takes its
            part with it; views of host memory (`host_tensor`, `host_state_dict`, `on_host`) of what is shared raise
            `NotOnHostError`; and `close` is collective while something is offloaded. See `megastow.replicas`.

    Raises:
        InvalidTypeError: `model` is not a module or a list of modules, or another argument is of a wrong type.
        InvalidArgumentError: parameters on several devices, none at all, an impossible size or `agree_timeout`, no such
            `host_memory` or `verify`, a `disk_folder` that is missing, in memory (tmpfs), or open to other users, where
            "disk" asks for it, `derive_weights` with an adapter that cannot do it, or without
            the `group` that it needs, or `replicas` without torch.distributed.
        AgreementError: the ranks of `group` made different calls.
        PeerError: another rank of `group` failed, or did not come within `agree_timeout`.
        AdapterSelectionError: not exactly one adapter accepts.
        UnsupportedLayoutError: the adapter knows that layout and cannot move it.
        StateChangedError: another manager has offloaded this model at present.
    """
    arguments.flags(replicas=replicas)
    if replicas and group is None:
        group = _world()
    agreement = agreement_of(group, agree_timeout)
    options = ", derive_weights" if derive_weights else ""
    options += f", replicas=True, chunk_bytes={chunk_bytes}" if replicas else ""
    call = Call(f"create_memory_manager(agree_timeout={agree_timeout:g}{options})", (*[NOTES] * replicas, None))
    with agreement.making(call) as ballot:
        manager = _create(
            model,
            optimizer,
            adapter,
            agreement,
            bucket_bytes=bucket_bytes,
            chunk_bytes=chunk_bytes,
            host_memory=host_memory,
            disk_folder=disk_folder,
            verify=verify,
            derive_weights=derive_weights,
            group=group,
            circle=_circle(group, agreement, agree_timeout, ballot) if replicas and group is not None else None,
        )
        try:
            ballot.confirm()
        except BaseException:
            manager.close()
            raise
    return manager


def _create(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: Any,
    adapter: str | None,
    agreement: Agreement,
    *,
    bucket_bytes: int,
    chunk_bytes: int,
    host_memory: HostMemory,
    disk_folder: str | os.PathLike[str] | None,
    verify: Literal["none", "digest"],
    derive_weights: bool,
    group: torch.distributed.ProcessGroup | None,
    circle: Circle | None,
) -> MemoryManager:
    """Check the arguments, choose the adapter, make the manager."""
    given: list[Any] = list(model) if isinstance(model, (list, tuple, torch.nn.ModuleList)) else [model]
    for chunk in given:
        if not isinstance(chunk, torch.nn.Module):
            raise InvalidTypeError(
                f"model is or contains a {type(chunk).__qualname__}; expected a torch.nn.Module (Megatron's "
                "DistributedDataParallel chunk, or any module) or a list of them"
            )
    chunks: list[torch.nn.Module] = given
    if not chunks:
        raise InvalidArgumentError("model is an empty list; expected at least one module")
    arguments.whole_number("bucket_bytes", bucket_bytes, "bytes", least=1)
    arguments.whole_number("chunk_bytes", chunk_bytes, "bytes", least=1)
    arguments.flags(derive_weights=derive_weights)
    if verify not in ("none", "digest"):
        raise InvalidArgumentError(f"verify is {verify!r}; expected 'none' or 'digest'")
    folder = _disk_folder(host_memory, disk_folder)
    chosen = choose_adapter(chunks, optimizer, adapter)
    logger.info("adapter %s takes charge of %d chunk(s)", chosen.name, len(chunks))
    bound = chosen.bind(chunks, optimizer)
    return MemoryManager(
        bound,
        bucket_bytes=bucket_bytes,
        chunk_bytes=chunk_bytes,
        host_memory=host_memory,
        folder=folder,
        digests=verify == "digest",
        agreement=agreement,
        derivable=derivable_buffers_of(bound, group) if derive_weights else None,
        circle=circle,
    )


def _world() -> torch.distributed.ProcessGroup:
    """All ranks, for managers with replicas that are not told which."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise InvalidArgumentError(
            "replicas=True needs torch.distributed, which is not initialised: there are no ranks to share with. Call "
            "torch.distributed.init_process_group first, or leave replicas out"
        )
    world = torch.distributed.group.WORLD
    assert world is not None
    return world


def _circle(
    group: torch.distributed.ProcessGroup, agreement: Agreement, seconds: float, ballot: Ballot
) -> Circle | None:
    """The ranks of a group by the hosts that they are on; None if there is only one rank."""
    hosts = ballot.exchange(machine.host_identity(), torch.distributed.get_process_group_ranks(group))
    return Circle(group, hosts, seconds, agreement.name) if hosts else None


def _disk_folder(host_memory: HostMemory, disk_folder: str | os.PathLike[str] | None) -> DiskFolder:
    """Check what a caller says of where copies are to be kept."""
    if host_memory not in HOST_MEMORY:
        raise InvalidArgumentError(f"host_memory is {host_memory!r}; expected one of {', '.join(HOST_MEMORY)}")
    if disk_folder is not None and not isinstance(disk_folder, (str, os.PathLike)):
        raise InvalidTypeError(f"disk_folder is a {type(disk_folder).__qualname__}; expected a path or None")
    if disk_folder is not None and not os.fspath(disk_folder):
        raise InvalidArgumentError("disk_folder is empty; expected the path of an existing folder, or None")
    folder = DiskFolder(disk_folder)
    if host_memory == "disk":
        folder.check()
    return folder


def create_trainer_memory_manager(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: Any,
    use_distributed_optimizer: bool,
    accumulate_allreduce_grads_in_fp32: bool,
    params_dtype: torch.dtype,
    bucket_size_mb: int = 0,
    **options: Any,
) -> MemoryManager:
    """Make a manager from the classic signature. What it is told is checked against what is found.

    With `group`, this call is collective: a rank that is told something wrong makes it fail on all of them.

    Args:
        model: as for `create_memory_manager`.
        optimizer: as for `create_memory_manager`.
        use_distributed_optimizer: whether the optimizer is Megatron's DistributedOptimizer.
        accumulate_allreduce_grads_in_fp32: whether gradient buffers are fp32.
        params_dtype: dtype of most parameters.
        bucket_size_mb: size of the device buckets in MiB; 0 for the default.
        **options: what else `create_memory_manager` takes, such as `group`, `host_memory` or `verify`.

    Raises:
        InvalidArgumentError: an argument disagrees with the trainer; and whatever `create_memory_manager` raises.
    """
    arguments.whole_number("bucket_size_mb", bucket_size_mb, "MiB (0 for the default)")
    told = {
        "use_distributed_optimizer": use_distributed_optimizer,
        "accumulate_allreduce_grads_in_fp32": accumulate_allreduce_grads_in_fp32,
        "params_dtype": params_dtype,
    }
    bucket_bytes = (bucket_size_mb << 20) or DEFAULT_BUCKET_BYTES
    manager = create_memory_manager(model, optimizer, bucket_bytes=bucket_bytes, **options)
    try:
        with manager._agreement.making(Call("create_trainer_memory_manager")):
            _check_told(told, manager.facts)
    except BaseException:
        manager.close()
        raise
    return manager


def _check_told(told: Mapping[str, object], facts: Mapping[str, object]) -> None:
    """Hold what a caller says of a trainer against what was found.

    Raises:
        InvalidArgumentError: something is not so.
    """
    wrong = [
        f"{name} is given as {value!r}, and the trainer has {facts[name]!r}"
        for name, value in told.items()
        if name in facts and facts[name] != value
    ]
    if wrong:
        raise InvalidArgumentError(f"{'; '.join(wrong)}. Correct the arguments, or use create_memory_manager")
