"""What is global in a process; see the package's docstring."""

from megastow_conformance.doubles.process import get_args, set_args

__all__ = ["get_args", "set_args"]
