"""Shared by the tests of the core: a small trainer, and an oracle that never calls megastow."""

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for core_toys, also in the processes that tests start

from core_toys import Trainer

from megastow import machine


@pytest.fixture
def trainer():
    """A trainer that has made two steps, so that moments and gradients are there."""
    made = Trainer()
    made.step()
    made.step()
    return made


@pytest.fixture(scope="session")
def disk_folder():
    """A folder that is not in memory; on some machines /tmp is."""
    for parent in (tempfile.gettempdir(), "/var/tmp", str(Path.cwd())):
        if machine.file_system(Path(parent)) not in ("tmpfs", "ramfs"):
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                yield folder
            return
    pytest.skip("there is no disk here")
