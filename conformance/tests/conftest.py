"""Shared by the tests of the suite's machinery."""

import sys
from pathlib import Path

# Worker processes import the small checks and the harness without Megatron by name.
sys.path.insert(0, str(Path(__file__).parent / "machinery"))
