"""What `test_replicas` has real trainers do in workers, on every rank."""

from megastow import create_memory_manager
from megastow_conformance import oracle
from megastow_conformance.checks.common import away, everything, trained, twin

STEPS = 4


def keeps_a_part(case, shares, **options):
    """Each rank keeps a part of what all have, all bits come back, and training goes on as without.

    `shares` has the least and the most host memory by kind, over what it takes without replicas and `options`.
    """
    expected = twin(case, STEPS)
    trainer = trained(case)
    with create_memory_manager(trainer.model, trainer.optimizer) as manager:
        whole = manager.offload()
        manager.onload()
    before = oracle.snapshot(everything(trainer, grads=False))
    manager = create_memory_manager(trainer.model, trainer.optimizer, replicas=True, agree_timeout=30, **options)
    with manager:
        for _ in range(2):
            with away(case, manager, trainer):
                pass
            oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=False)), "after a cycle")
        report = manager.offload()
        manager.onload()
        assert not [note for note in report.notes if "not the same" in note], report.notes
        for kind, (least, most) in shares.items():
            ours, theirs = report.kinds[kind].host_bytes, whole.kinds[kind].host_bytes
            assert least * theirs <= ours <= most * theirs, f"{kind} takes {ours} bytes of the host, of {theirs}"
        records = tuple(trainer.train_step(index) for index in range(2, STEPS))
        assert records == expected.records[2:]
        oracle.assert_same(expected.state, oracle.snapshot(trainer.named_state()), "state after training on")


def notices_ranks_between_a_step_and_its_gather(case):
    """Ranks differ in the weights then: each keeps them all, and no bit is lost."""
    trainer = trained(case)
    with create_memory_manager(trainer.model, trainer.optimizer, replicas=True, agree_timeout=30) as manager:
        manager.offload("weights")
        manager.onload("weights")
        buffers = [buffer.param_data for chunk in trainer.model for buffer in chunk.buffers]
        for buffer in buffers:
            if case.rank == 1:
                buffer[len(buffer) // 2 :] += 1  # as if the other's half had not been gathered yet
        before = oracle.snapshot({str(n): buffer for n, buffer in enumerate(buffers)})
        report = manager.offload("weights")
        assert any("not the same on ranks 0, 1" in note for note in report.notes), report.notes
        manager.onload("weights")
        oracle.assert_same(before, oracle.snapshot({str(n): b for n, b in enumerate(buffers)}), "after a cycle")
