"""A manager and the life of a process: forks of it, and its end. All in processes of their own."""

import textwrap
from concurrent.futures import ThreadPoolExecutor

from core_toys import run_python

SET_UP = """
import os, sys, threading
from core_toys import KINDS, Trainer, assert_same, snapshot
from megastow import ForkedProcessError, OffloadedError, create_memory_manager
from megastow.transport import Transport

trainer = Trainer()
trainer.step()
before = snapshot(trainer.tensors(KINDS[:3]))
manager = create_memory_manager(trainer.model, trainer.optimizer, bucket_bytes=4096, chunk_bytes=512)


def in_a_fork(work):
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def expect(error, call, *arguments):
    try:
        call(*arguments)
    except error as raised:
        return str(raised)
    raise AssertionError(f"{call} raised nothing")


def held_copies(name):
    reached, go_on = threading.Event(), threading.Event()
    original = getattr(Transport, name)

    def held(*arguments):
        reached.set()
        assert go_on.wait(30)
        original(*arguments)

    setattr(Transport, name, held)
    return reached, go_on, original
"""


def run(code):
    return run_python(SET_UP + textwrap.dedent(code), timeout=150)


def test_a_forked_child_is_refused_and_its_parent_is_not():
    run("""
    def child():
        asked = manager.plan, manager.explain_residue
        for call in (manager.offload, manager.onload, *asked, manager.prepare, manager.wait, manager.close):
            assert f"process {os.getppid()}" in expect(ForkedProcessError, call)
        expect(OffloadedError, trainer.model, None)

    manager.offload()
    in_a_fork(child)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))
    in_a_fork(lambda: expect(ForkedProcessError, manager.offload))
    manager.offload()
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))
    manager.close()
    """)


def test_a_fork_in_the_middle_of_a_move_waits_for_nothing_in_the_child():
    run("""
    def child():
        expect(OffloadedError, trainer.model, None)
        expect(ForkedProcessError, manager.wait)

    for direction, method in (("offload", "copy_out"), ("onload", "copy_in")):
        reached, go_on, original = held_copies(method)
        handle = getattr(manager, direction)(non_blocking=True)
        assert reached.wait(30)
        in_a_fork(child)
        go_on.set()
        handle.wait(30)
        setattr(Transport, method, original)
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))
    """)


def test_a_child_that_forks_while_locks_are_held_can_make_a_manager_of_its_own():
    run("""
    from megastow import engine, guard

    def child():
        other = Trainer(seed=1)
        other.step()
        mine = create_memory_manager(other.model, other.optimizer)
        kept = snapshot(other.tensors(KINDS[:3]))
        mine.offload()
        mine.onload()
        assert_same(kept, snapshot(other.tensors(KINDS[:3])))

    for lock in (engine._CLAIMING, guard._REPLACING):
        held, let_go = threading.Event(), threading.Event()

        def hold(lock=lock, held=held, let_go=let_go):
            with lock:
                held.set()
                let_go.wait(1)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(30)
        in_a_fork(child)
        let_go.set()
        thread.join()
    """)


ENDS = (
    "manager.offload()",
    "manager.offload(); manager.onload('weights')",
    "manager.prepare(wait=True)",
    "manager.prepare()",
    "manager.offload(non_blocking=True)",
    "manager.offload(); manager.onload(non_blocking=True)",
    "manager.offload(); manager.close(discard=True); manager.close()",
    "manager.cycle = [manager, trainer]; manager.offload()",
    *["manager = create_memory_manager(trainer.model, host_memory='pageable'); manager.offload(); manager.onload()"]
    * 6,
)


def test_an_interpreter_that_ends_says_nothing_and_unlocks_everything():
    run(f"""
    from megastow.device import CpuDevice

    for end in {ENDS}:
        out, write = os.pipe()
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(write, stream)  # what an ending interpreter complains of comes here too
            CpuDevice.lock_pages = lambda device, address, nbytes: os.write(1, b"+")
            CpuDevice.unlock_pages = lambda device, address: os.write(1, b"-")
            trainer = Trainer()
            trainer.step()
            manager = create_memory_manager(trainer.model, trainer.optimizer)
            exec(end)
            os.write(1, b"end")
            break  # out of the script, and so to the end of the interpreter
        os.close(write)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed = os.read(out, 1 << 16).decode()
        assert status == 0, f"{{end}}: exit {{status}}, {{printed}}"
        assert set(printed.replace("end", "")) == set("+-"), f"{{end}}: {{printed}}"
        assert printed.count("+") == printed.count("-"), f"{{end}}: {{printed}}"
    """)


def test_threads_that_copy_do_not_abort_an_interpreter_that_ends():
    code = """
import torch
from megastow import create_memory_manager

manager = create_memory_manager(torch.nn.Linear(512, 512), host_memory="pageable")
manager.offload()
manager.onload()
"""
    with ThreadPoolExecutor(4) as pool:  # one alone was aborted in one of three times
        list(pool.map(run_python, [code] * 8))


def test_a_move_at_the_very_end_of_the_interpreter_is_refused():
    """By a finalizer: threads are gone, and torch would end the process in the middle of it."""
    late = """
    manager.offload()


    class Late:
        def __del__(self, onload=manager.onload, write=os.write):
            try:
                onload()
            except Exception as error:
                write(1, str(error).encode())


    late = Late()
    """
    assert "the interpreter is shutting down" in run_python(SET_UP + textwrap.dedent(late))
