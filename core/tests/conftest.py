"""Shared by the tests of the core: a small trainer, and an oracle that never calls megastow."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for core_toys, also in the processes that tests start

from core_toys import Trainer


@pytest.fixture
def trainer():
    """A trainer that has made two steps, so that moments and gradients are there."""
    made = Trainer()
    made.step()
    made.step()
    return made
