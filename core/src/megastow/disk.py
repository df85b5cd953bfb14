"""Files that hold what is offloaded: of exact size, private, without a name, read and written past the page cache.

[Note: why a file has no name]
A file is made without a name (O_TMPFILE), or, where the file system cannot do that, loses it before anything is
written. The kernel gives its blocks back with the last descriptor, however the process ends, and nobody else can open
it, so that no names can collide. What a crash between making a file and unlinking it leaves is empty. Any name in our
folder is therefore a leftover or about to be removed by its maker, and removing it is right whoever does it: `_tidy`
needs no lock and no pid.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import stat
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megastow import faults, machine
from megastow.errors import HostMemoryError, InvalidArgumentError
from megastow.report import format_bytes
from megastow.tiers import Region, Tier

BLOCK_BYTES = 4096
"""What transfers past the page cache are aligned to, in the file and in memory: no disk asks for more."""

_PREFIX = "kept-"
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class DiskSpace:
    """What a file system can give.

    Attributes:
        path: the folder that was asked about.
        total_bytes: the size of the file system.
        free_bytes: what a user without privileges can have now.
    """

    path: str
    total_bytes: int
    free_bytes: int


class DiskFolder:
    """The folder that one user's files are made in: `megastow-<uid>` in a folder on a disk."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Nothing is touched yet.

        Args:
            path: an existing folder on a disk; None for $TMPDIR, or /var/tmp where that is not set.
        """
        self.path = Path(os.environ.get("TMPDIR") or "/var/tmp") if path is None else Path(path).absolute()

    def space(self) -> DiskSpace:
        """What the file system can give now.

        Raises:
            InvalidArgumentError: there is no such folder, or it is in memory.
        """
        try:
            found = os.statvfs(self.path)
        except OSError as error:
            raise InvalidArgumentError(
                f"the disk folder {self.path} cannot be used ({error.strerror}); expected an existing folder on a "
                "disk. Make it, or name another one with disk_folder"
            ) from error
        space = DiskSpace(str(self.path), found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)
        kind = machine.file_system(self.path)
        if kind in _MEMORY_FILE_SYSTEMS:
            raise InvalidArgumentError(
                f"the disk folder {self.path} is on {kind}, which is memory ({format_bytes(space.free_bytes)} of "
                f"{format_bytes(space.total_bytes)} free): a file there would take what it is meant to spare. Name a "
                "folder on a disk with disk_folder"
            )
        return space

    def check(self) -> None:
        """See that files can be made here; makes the user's own folder.

        Raises:
            InvalidArgumentError: the folder is missing, in memory, or not safe from other users.
        """
        self.space()
        with self._opened():
            pass

    def create(self, nbytes: int) -> FileRegion:
        """Make a file of exactly `nbytes`, which are there for sure from then on where the file system can do that.

        Raises:
            InvalidArgumentError: the folder is missing, in memory, or not safe from other users.
            HostMemoryError: the disk has no room for it; nothing is left behind.
        """
        space = self.space()
        try:
            with self._opened() as folder:
                _tidy(folder)
                region = FileRegion(_open_without_name(folder), nbytes)
            try:
                faults.point("disk.reserve")
                region.reserve()
            except BaseException:
                region.close()
                raise
        except OSError as error:
            raise HostMemoryError(
                f"{format_bytes(nbytes)} could not be had in {self.path} ({error.strerror}), where "
                f"{format_bytes(space.free_bytes)} of {format_bytes(space.total_bytes)} are free; nothing was moved. "
                "Make room there, raise the quota or the file size limit, or name another disk_folder"
            ) from error
        return region

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the user's own folder, made if need be. What was checked is what is used."""
        name = f"megastow-{os.geteuid()}"
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        with contextlib.ExitStack() as opened:
            try:
                parent = os.open(self.path, flags)
                opened.callback(os.close, parent)
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=parent)
                folder = os.open(name, flags | os.O_NOFOLLOW, dir_fd=parent)
                opened.callback(os.close, folder)
            except OSError as error:
                raise InvalidArgumentError(
                    f"{self.path / name} cannot be used ({error.strerror}); expected a folder of our own, or that one "
                    "can be made. Nothing was moved. Remove what is there, or name another disk_folder"
                ) from error
            problem = _why_unsafe(os.fstat(folder))
            if problem is not None:
                raise InvalidArgumentError(
                    f"{self.path / name} {problem}, so others could tamper with what is kept there; expected a folder "
                    "of our own that nobody else can write to. Nothing was moved. Remove it, or name another "
                    "disk_folder"
                )
            yield folder


class FileRegion(Region):
    """A file without a name."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Take charge of the descriptor of an empty file; `reserve` before use."""
        self.nbytes = -(-nbytes // machine.PAGE_BYTES) * machine.PAGE_BYTES
        self._file = _File(descriptor)
        self._past_cache = False

    @property
    def tier(self) -> Tier:
        """`Tier.DISK`."""
        return Tier.DISK

    def reserve(self) -> None:
        """Take the blocks, and find out whether the page cache can be passed by.

        Raises:
            OSError: there is no room for so many.
        """
        os.posix_fallocate(self._file.descriptor, 0, self.nbytes)
        self._past_cache = _passes_cache(self._file.descriptor)

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """What the file says now, in new memory."""
        memory = mmap.mmap(-1, _blocks(nbytes))
        self.read(offset, torch.frombuffer(memory, dtype=torch.uint8), nbytes)
        return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)

    def lend(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """What the file says now, in new memory that is whoever's who has it."""
        return self.view(offset, nbytes).untyped_storage()

    def write(self, offset: int, buffer: torch.Tensor, nbytes: int) -> None:
        """Write; returns when the file system has taken the bytes, which is no promise beyond a loss of power.

        Without a way past the page cache they are on the disk then: late errors come to light, and memory is spared.
        """
        file = self._file  # stays open until we are done, whoever closes the region
        faults.point("disk.write")
        left, position = _bytes(buffer, _blocks(nbytes)), offset
        while left:
            done = os.pwrite(file.descriptor, left, position)
            left, position = left[done:], position + done
        if not self._past_cache:
            os.fdatasync(file.descriptor)
            os.posix_fadvise(file.descriptor, offset, _blocks(nbytes), os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, buffer: torch.Tensor, nbytes: int) -> None:
        """Read what was written."""
        file = self._file
        faults.point("disk.read")
        left, position = _bytes(buffer, _blocks(nbytes)), offset
        while left:
            done = os.preadv(file.descriptor, [left], position)
            if not done:
                raise OSError(errno.EIO, f"the file ends at {position} of {self.nbytes} bytes: somebody cut it short")
            left, position = left[done:], position + done
        if not self._past_cache:
            os.posix_fadvise(file.descriptor, offset, _blocks(nbytes), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Give the blocks back. A read or write under way in another thread ends well, and what it did is lost."""
        self._file.discard()


class _File:
    """A descriptor; closed, and its file given back, when nobody uses it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._owner = os.getpid()
        weakref.finalize(self, os.close, descriptor)

    def discard(self) -> None:
        if os.getpid() == self._owner:  # a forked child shares the file
            os.ftruncate(self.descriptor, 0)


def disk_shortage(nbytes: int, space: DiskSpace, local_ranks: int) -> str | None:
    """Why `nbytes` more cannot be had on a disk by this process, and as much by every process of the job on this host.

    Judged as host memory is: see `megastow.host.shortage`.
    """
    everyone = nbytes * local_ranks
    if nbytes <= space.free_bytes and everyone <= space.total_bytes:
        return None
    others = f" and {format_bytes(everyone)} in all {local_ranks} processes of this host" if local_ranks > 1 else ""
    return (
        f"an offload needs {format_bytes(nbytes)} of disk space in this process{others}, but "
        f"{format_bytes(space.free_bytes)} of {format_bytes(space.total_bytes)} are free in {space.path}"
    )


def _why_unsafe(found: os.stat_result) -> str | None:
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, and we are user {os.geteuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def _tidy(folder: int) -> None:
    """Remove what crashes left. See [Note: why a file has no name]."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.startswith(_PREFIX) and e.is_file(follow_symlinks=False)]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def _open_without_name(folder: int) -> int:
    flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
    name = f"{_PREFIX}{secrets.token_hex(16)}"
    descriptor = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    with contextlib.suppress(FileNotFoundError):  # another process tidied it
        os.unlink(name, dir_fd=folder)
    return descriptor


def _passes_cache(descriptor: int) -> bool:
    """Switch the page cache off, if the file system really can: some accept the flag and refuse the transfer."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with contextlib.closing(mmap.mmap(-1, BLOCK_BYTES)) as block:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            os.pwrite(descriptor, block, 0)
            os.preadv(descriptor, [block], 0)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
            return False
    return True


def _blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def _bytes(buffer: torch.Tensor, nbytes: int) -> memoryview:
    """The first bytes of a tensor in host memory, no copy; the tensor has to outlive it."""
    assert nbytes <= buffer.nbytes
    return memoryview((ctypes.c_ubyte * nbytes).from_address(buffer.data_ptr())).cast("B")
