"""Checks that end in every way in which a check can end."""

import ctypes
import os
import sys
import time
from pathlib import Path

import torch


def passes(case):
    total = torch.ones(3)
    torch.distributed.all_reduce(total)
    if total.tolist() != [case.world] * 3:
        raise AssertionError(total)


def says_pid(case, folder):
    Path(folder, f"{case.row.id}-{case.rank}-{os.getpid()}").touch()


def fails(case):
    raise AssertionError(f"3 of 7 tensors differ on rank {case.rank}")


def skips(case):
    case.skip("this release has no such thing")


def one_rank_skips(case):
    if case.rank == 1:
        case.skip("only here")


def segfaults(case):
    print("about to read address 0", flush=True)
    ctypes.string_at(0)


def exits(case):
    os._exit(3)


def sys_exits(case):
    sys.exit(0)


def raises_eof(case):
    raise EOFError("the check's own")


def hangs(case):
    time.sleep(600)


def hangs_in_c(case):
    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the interpreter lock


def rank_1_raises(case):
    if case.rank == 1:
        raise ValueError("rank 1 has had enough")
    torch.distributed.barrier()


def rank_1_segfaults(case):
    if case.rank == 1:
        ctypes.string_at(0)
    torch.distributed.barrier()


def builds(case):
    case.on_close(lambda: print("before the trainer", flush=True) if trainer else None)
    trainer = case.build()
    case.on_close(lambda: print("after the trainer", flush=True))


def builds_and_skips(case):
    case.build()
    case.skip("built for nothing")


def fails_to_close(case):
    def close():
        raise RuntimeError("a hook is left")

    case.on_close(close)


def chatters(case, text):
    print(text, flush=True)


def chatters_and_fails(case):
    for number in range(200):
        print("line", number)
    raise AssertionError("after much talk")


def checks_environment(case):
    import machinery_checks

    assert torch.get_num_threads() == 1
    assert os.environ["RANK"] == str(case.rank)
    assert case.device == torch.device("cpu")
    assert machinery_checks.__name__ == __name__


class Recorded:
    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options

    def close(self):
        print("manager closed", flush=True)


def subject(model, optimizer=None, **options):
    return Recorded(model, optimizer, **options)


def asks_the_subject(case):
    trainer = case.build()
    manager = case.manager(trainer, bucket_bytes=7)
    assert type(manager) is Recorded
    assert manager.arguments == (trainer.model, trainer.optimizer)
    assert manager.options == {"bucket_bytes": 7}


def builds_and_fails(case):
    case.build()
    raise AssertionError("after building")


def has_imported_torch_only(case):
    """Asked after the harness was loaded, which imports nothing by itself."""
    for name in ("megatron", "apex", "transformer_engine", "_pytest"):
        assert name not in sys.modules, name
    assert "torch._dynamo" in sys.modules
    assert Path(sys.path[0]) == Path.cwd()


def notes_a_hash(case, folder):
    with Path(folder, f"rank{case.rank}").open("a") as file:
        print(hash("of a word"), file=file)
