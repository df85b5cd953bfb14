"""Files that hold what is offloaded: exact, private, nameless; and what happens when the disk does not go along."""

import errno
import fcntl
import itertools
import mmap
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from core_toys import KINDS, assert_same, run_python, snapshot

from megastow import HostMemoryError, InvalidArgumentError, Residency, TransferError, create_memory_manager, machine
from megastow.disk import DiskFolder

PAGE = machine.PAGE_BYTES
FILES = 5
"""One for each kind of the trainer, and one for what is transient of the weights."""

OWN = f"megastow-{os.geteuid()}"


@pytest.fixture
def folder(disk_folder, tmp_path_factory):
    """An empty folder on a disk."""
    made = Path(disk_folder) / tmp_path_factory.mktemp("disk").name
    made.mkdir()
    return made


@pytest.fixture
def manager(trainer, folder):
    made = create_memory_manager(
        trainer.model, trainer.optimizer, host_memory="disk", disk_folder=folder, bucket_bytes=1, chunk_bytes=4096
    )
    yield made
    made.close(discard=True)


def descriptors(folder):
    """Open descriptors of this process on files in the folder, named or not."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = entry.readlink()
        except FileNotFoundError:  # that of the listing itself
            continue
        if str(target).startswith(f"{folder}/{OWN}/"):
            found.append(int(entry.name))
    return found


def noise(nbytes):
    """Page-aligned memory of whole pages, filled with noise."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).random_(0, 256)


def works(manager, trainer):
    before = snapshot(trainer.tensors())
    manager.offload(keep_grads=True)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


# --- what lies on the disk -------------------------------------------------------------------------------------------


def test_files_are_exact_private_and_have_no_name(trainer, manager, folder):
    mask = os.umask(0)
    try:
        manager.offload(keep_grads=True)
    finally:
        os.umask(mask)
    own = (folder / OWN).lstat()
    assert (stat.S_IMODE(own.st_mode), own.st_uid) == (0o700, os.geteuid())
    assert list((folder / OWN).iterdir()) == []
    files = {number: os.fstat(number) for number in descriptors(folder)}
    assert len(files) == FILES
    for number, found in files.items():
        assert (stat.S_IMODE(found.st_mode), found.st_nlink, found.st_uid) == (0o600, 0, os.geteuid())
        assert fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert found.st_blocks * 512 >= found.st_size
    assert sum(found.st_size for found in files.values()) == manager.disk_bytes
    manager.onload()
    manager.close()
    assert descriptors(folder) == []
    assert manager.disk_bytes == 0


def test_the_page_cache_is_passed_by_where_the_file_system_can(folder):
    path = folder / "probe"
    path.write_bytes(bytes(PAGE))
    try:
        probe = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("not on this file system")
    os.close(probe)
    region = DiskFolder(folder).create(10 * PAGE)
    [number] = descriptors(folder)
    assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT
    region.close()


def without_direct_transfers(monkeypatch, refusing):
    """A file system on which they do not work: it refuses the flag, or takes it and refuses the transfer."""
    real_control, real_write = fcntl.fcntl, os.pwrite

    def control(number, command, argument=0):
        if refusing == "flag" and command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct transfers")
        return real_control(number, command, argument)

    def write(number, content, offset):
        if real_control(number, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct transfers")
        return real_write(number, content, offset)

    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "pwrite", write)


@pytest.mark.parametrize("refusing", ["flag", "transfer"])
def test_without_a_way_past_the_page_cache_it_is_kept_small(trainer, manager, folder, monkeypatch, refusing):
    without_direct_transfers(monkeypatch, refusing)
    real, calls = os.posix_fadvise, []

    def advise(number, offset, nbytes, advice):
        calls.append(advice)
        real(number, offset, nbytes, advice)

    real_sync = os.fdatasync
    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(os, "fdatasync", lambda number: (calls.append("sync"), real_sync(number)))
    before = snapshot(trainer.tensors())
    manager.offload(keep_grads=True)
    assert not any(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT for number in descriptors(folder))
    assert calls.count("sync") == calls.count(os.POSIX_FADV_DONTNEED) > 3
    calls.clear()
    manager.onload()
    assert set(calls) == {os.POSIX_FADV_DONTNEED}
    assert_same(before, snapshot(trainer.tensors()))


def without_nameless_files(monkeypatch):
    """A file system that does not make them; returns the names that are made instead."""
    real, names = os.open, []

    def open_(path, flags, mode=0o777, *, dir_fd=None):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no nameless files")
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            assert flags & os.O_NOFOLLOW
            assert flags & os.O_CLOEXEC
            names.append(path)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_)
    return names


def test_a_file_that_must_have_a_name_loses_it_at_once(trainer, manager, folder, monkeypatch):
    names = without_nameless_files(monkeypatch)
    works(manager, trainer)
    assert len(set(names)) == FILES
    assert all(re.fullmatch("kept-[0-9a-f]{32}", name) for name in names)  # tells nothing, is not guessed
    assert list((folder / OWN).iterdir()) == []
    assert {(os.fstat(n).st_nlink, stat.S_IMODE(os.fstat(n).st_mode)) for n in descriptors(folder)} == {(0, 0o600)}


# --- who else is there -----------------------------------------------------------------------------------------------


def refused(folder, match):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(InvalidArgumentError, match=match) as raised:
        create_memory_manager(model, host_memory="disk", disk_folder=folder)
    assert "disk_folder" in str(raised.value)


def test_a_link_in_place_of_our_folder_is_refused(folder):
    (folder / "elsewhere").mkdir(mode=0o700)
    (folder / OWN).symlink_to(folder / "elsewhere")
    refused(folder, "cannot be used")
    assert list((folder / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(folder, mode):
    (folder / OWN).mkdir()
    (folder / OWN).chmod(mode)
    refused(folder, f"can be written to by others .mode 0{mode:o}")


def test_a_folder_of_somebody_else_is_refused(folder, monkeypatch):
    someone = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: someone)
    refused(folder, f"belongs to user {someone - 1}, and we are user {someone}")


def test_a_file_in_place_of_our_folder_is_refused(folder):
    (folder / OWN).touch()
    refused(folder, "cannot be used")


def test_a_folder_in_memory_is_refused_with_figures(folder, monkeypatch):
    monkeypatch.setattr(machine, "file_system", lambda path: "tmpfs")
    refused(folder, r"is on tmpfs, which is memory .*B of .*B free")
    assert list(folder.iterdir()) == []


def test_a_real_folder_in_memory_is_refused():
    if machine.file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("there is none here")
    refused("/dev/shm", "is on tmpfs")


def test_the_default_is_the_folder_for_temporary_files(folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(folder))
    assert DiskFolder().path == folder
    monkeypatch.delenv("TMPDIR")
    assert DiskFolder().path == Path("/var/tmp")


def test_what_becomes_unsafe_later_refuses_the_offload(trainer, manager, folder):
    before = snapshot(trainer.tensors())
    (folder / OWN).chmod(0o777)
    with pytest.raises(InvalidArgumentError, match="others could tamper"):
        manager.offload()
    assert manager.residency("weights") is Residency.RESIDENT
    assert_same(before, snapshot(trainer.tensors()))
    (folder / OWN).chmod(0o700)
    works(manager, trainer)


# --- crashes and forks -----------------------------------------------------------------------------------------------

CRASH = """
import os, signal, sys, errno, torch
from megastow import create_memory_manager

kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "between making and unlinking":
    real = os.open
    def open_(path, flags, *rest, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "")
        return real(path, flags, *rest, **options)
    os.open, os.unlink = open_, kill
if sys.argv[2] == "in the middle of writing":
    os.pwrite = kill
manager = create_memory_manager(torch.nn.Linear(512, 512), host_memory="disk", disk_folder=sys.argv[1])
manager.offload()
kill()
"""


@pytest.mark.parametrize("when", ["afterwards", "in the middle of writing", "between making and unlinking"])
def test_a_crash_leaves_nothing_or_what_the_next_start_removes(folder, when):
    dead = subprocess.run([sys.executable, "-c", CRASH, str(folder), when], timeout=90, check=False)
    assert dead.returncode == -signal.SIGKILL
    left = list((folder / OWN).iterdir())
    assert len(left) == (when == "between making and unlinking")
    assert all(path.stat().st_size == 0 for path in left)
    others = [folder / OWN / "notes.txt", folder / OWN / "kept-by-a-user"]
    others[0].touch()
    others[1].mkdir()
    (folder / OWN / "kept-link").symlink_to(others[0])
    DiskFolder(folder).create(PAGE).close()
    assert {path.name for path in (folder / OWN).iterdir()} == {"notes.txt", "kept-by-a-user", "kept-link"}


def test_a_child_leaves_the_files_of_its_parent_alone(folder):
    run_python(f"""
import gc, os, torch
from megastow import create_memory_manager

model = torch.nn.Linear(64, 64)
before = model.weight.detach().clone()
manager = create_memory_manager(model, host_memory="disk", disk_folder={str(folder)!r})
manager.offload()
child = os.fork()
if not child:
    manager._engine._arena.close()
    del manager
    gc.collect()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
manager.onload()
assert torch.equal(before, model.weight)
manager.close()
""")


def test_an_interpreter_may_end_while_everything_is_on_disk(folder):
    printed = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
                import torch
                from megastow import create_memory_manager
                model = torch.nn.Linear(64, 64)
                manager = create_memory_manager(model, host_memory="disk", disk_folder={str(folder)!r})
                manager.prepare(wait=True)
                manager.offload(non_blocking=True)
            """),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert printed.stderr == ""


def test_jobs_in_one_folder_do_not_meet(trainer, manager, folder):
    kept = snapshot(trainer.tensors(KINDS[:3]))
    manager.offload()
    model = torch.nn.Linear(33, 7)
    before = snapshot(dict(model.named_parameters()))
    with create_memory_manager(model, host_memory="disk", disk_folder=folder) as other:
        other.offload()
        manager.onload()
        manager.offload()
        other.onload()
        assert_same(before, snapshot(dict(model.named_parameters())))
    manager.onload()
    assert_same(kept, snapshot(trainer.tensors(KINDS[:3])))


# --- a disk that does not go along -----------------------------------------------------------------------------------


def test_a_full_disk_is_found_before_anything_moves(trainer, manager, folder, monkeypatch):
    before = snapshot(trainer.tensors())

    def full(number, offset, nbytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("something was written"))
    with pytest.raises(HostMemoryError, match=r"KiB could not be had in .*No space left on device.*are free"):
        manager.offload()
    assert manager.disk_bytes == 0
    assert descriptors(folder) == []
    assert all(manager.residency(kind) is Residency.RESIDENT for kind in KINDS)
    assert_same(before, snapshot(trainer.tensors()))
    monkeypatch.undo()
    works(manager, trainer)


def test_a_limit_on_file_sizes_is_found_before_anything_moves(folder):
    run_python(f"""
import resource, torch
from megastow import HostMemoryError, create_memory_manager

model = torch.nn.Linear(512, 512)
before = model.weight.detach().clone()
manager = create_memory_manager(model, host_memory="disk", disk_folder={str(folder)!r})
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, most))
try:
    manager.offload()
except HostMemoryError as error:
    assert "File too large" in str(error), error
else:
    raise AssertionError("not refused")
assert torch.equal(before, model.weight)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
manager.offload()
manager.onload()
assert torch.equal(before, model.weight)
""")


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_error_in_the_middle_is_undone_and_the_call_can_be_repeated(trainer, manager, monkeypatch, call, after):
    manager.offload(keep_grads=True)  # the files are there
    manager.onload()
    before = snapshot(trainer.tensors())
    if call == "preadv":
        manager.offload(keep_grads=True)
    move, resting = {
        "pwrite": (lambda: manager.offload(keep_grads=True), Residency.RESIDENT),
        "preadv": (manager.onload, Residency.OFFLOADED),
    }[call]
    real, passed = getattr(os, call), []

    def fail(*arguments):
        passed.append(None)
        if len(passed) > after:
            raise OSError(errno.EIO, "the disk is on fire")
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TransferError, match="the disk is on fire") as raised:
        move()
    assert isinstance(raised.value.__cause__, OSError)
    assert {manager.residency(kind) for kind in KINDS} == {resting}
    monkeypatch.undo()
    if resting is Residency.RESIDENT:
        assert_same(before, snapshot(trainer.tensors()))
    move()
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


def test_an_error_in_the_background_is_undone_too(trainer, manager, monkeypatch):
    before = snapshot(trainer.tensors())
    real, passed = os.pwrite, []

    def fail(*arguments):
        passed.append(None)
        if len(passed) > FILES + 5:  # behind the probe of each file
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", fail)
    handle = manager.offload(keep_grads=True, non_blocking=True)
    with pytest.raises(TransferError, match="No space left"):
        handle.wait(60)
    assert_same(before, snapshot(trainer.tensors()))
    monkeypatch.undo()
    works(manager, trainer)


def test_a_failed_move_is_not_over_while_a_thread_still_writes(trainer, manager, monkeypatch):
    before = snapshot(trainer.tensors())
    manager.prepare(wait=True)
    real, number = os.pwrite, itertools.count()
    writing, go_on = threading.Event(), threading.Event()

    def one_fails_while_another_hangs(*arguments):
        match next(number):
            case 0:
                assert writing.wait(30)
                raise OSError(errno.EIO, "the disk is on fire")
            case 1:
                writing.set()
                assert go_on.wait(30)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", one_fails_while_another_hangs)
    handle = manager.offload(*KINDS[:3], non_blocking=True)
    assert writing.wait(30)
    with pytest.raises(TimeoutError, match="still under way"):
        handle.wait(0.2)
    go_on.set()
    with pytest.raises(TransferError, match="the disk is on fire"):
        handle.wait(30)
    assert_same(before, snapshot(trainer.tensors()))
    monkeypatch.undo()
    works(manager, trainer)


def test_transfers_that_are_cut_short_are_continued(folder, monkeypatch):
    region = DiskFolder(folder).create(16 * PAGE)
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda n, content, at: write(n, content[:4096], at))
    monkeypatch.setattr(os, "preadv", lambda n, buffers, at: read(n, [buffers[0][:4096]], at))
    content, back = noise(8 * PAGE), noise(8 * PAGE)
    region.write(4 * PAGE, content, 8 * PAGE - 5)
    region.read(4 * PAGE, back, 8 * PAGE - 5)
    assert torch.equal(content[:-5], back[:-5])
    assert torch.equal(region.view(4 * PAGE, 8 * PAGE - 5), content[:-5])
    assert not region.view(0, 4 * PAGE).any()
    region.close()


def test_a_file_that_somebody_has_cut_short_is_not_read_as_if_it_were_whole(folder):
    region = DiskFolder(folder).create(4 * PAGE)
    content = noise(4 * PAGE)
    region.write(0, content, 4 * PAGE)
    [number] = descriptors(folder)
    os.truncate(number, PAGE)
    with pytest.raises(OSError, match="cut it short"):
        region.read(0, content, 4 * PAGE)
    region.close()
    region.close()
