"""Checks that worker processes run on trainers of the v1 and v2 doubles, beside those of the suite.

The test process, where there is no Megatron, imports them too, to name them.
"""

from megastow import create_memory_manager
from megastow_conformance import oracle
from megastow_conformance.checks import faults, training
from megastow_conformance.checks.common import assert_continues, trained
from megastow_conformance.trainer import Point
from megastow_legacy_v1v2 import binding


def gradient_memory_is_kept_while_it_holds_parameters(case):
    """From a successful step to the next forward pass, and not longer."""
    trainer = case.build()
    manager = case.manager(trainer)

    def kept_bytes():
        report = manager.offload("grad_buffers")
        manager.onload()
        return report.host_bytes

    def at(point):
        if point in (Point.AFTER_STEP, Point.AFTER_ZERO_GRAD):
            assert kept_bytes() > 0, f"dropped at {point}"

    assert kept_bytes() == 0, "there was no step yet"
    trainer.train_step(0, at)
    trainer.gather_weights()
    assert kept_bytes() == 0, "the parameters are in the model"
    assert_continues(case, trainer, done=1)


def gradients_kept_between_step_and_gather(case):
    """Where the gathering is a call of its own, keeping gradients is what saves the parameters."""
    undisturbed = trained(case)
    expected = oracle.snapshot(undisturbed.named_state())
    undisturbed.close()
    trainer = trained(case, steps=1)
    manager = case.manager(trainer)
    optimizer = trainer.optimizer

    def move_and_gather(*arguments):
        del optimizer.gather_model_params
        manager.offload(keep_grads=True)
        oracle.Garbage([1 << 16], case.device)
        manager.onload()
        optimizer.gather_model_params(*arguments)

    optimizer.gather_model_params = move_and_gather
    trainer.train_step(1)
    oracle.assert_same(expected, oracle.snapshot(trainer.named_state()), "state")


def model_alone(case):
    trainer = trained(case)
    before = oracle.snapshot(trainer.named_state())
    manager = create_memory_manager(trainer.model)
    case.on_close(manager.close)
    with manager.offloaded():
        assert all(p.untyped_storage().nbytes() == 0 for chunk in trainer.model for p in chunk.parameters())
    oracle.assert_same(before, oracle.snapshot(trainer.named_state()), "state")


# --- broken adapters, which the suite must catch ----------------------------------------------------------------------


def training_with_parameters_dropped(case):
    binding.GradBufferBinding.staged_gradients = lambda self: iter(())
    training.training(case)


def guard_without_the_forward_hooks(case):
    binding._GATHER_CALLS = {}
    faults.guard(case)
