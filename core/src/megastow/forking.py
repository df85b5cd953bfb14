"""Locks of the whole process, and `fork`: a data loader may fork while another thread holds one."""

from __future__ import annotations

import os
import threading


def process_lock() -> threading.RLock:
    """A lock for use by all of the process, which is never held by a thread that a forked child does not have."""
    lock = threading.RLock()
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
