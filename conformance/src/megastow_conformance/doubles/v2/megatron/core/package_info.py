"""The version that the real tree states."""

MAJOR = 0
MINOR = 5
PATCH = 0
PRE_RELEASE = ""

__version__ = f"{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}"
