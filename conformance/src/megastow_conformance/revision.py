"""Of which commit the code is that was run."""

from __future__ import annotations

import os
import subprocess


def find_revision(file: str) -> str | None:
    """The commit of the source tree that a file is a part of; None where it was installed from somewhere else.

    With "-dirty" behind it where the tree is not what was committed.
    """
    folder, name = os.path.split(file)
    git = ("git", "-C", folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook
    try:
        for command in (
            ("ls-files", "--error-unmatch", name),
            ("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
        ):
            done = subprocess.run(
                [*git, *command], capture_output=True, text=True, timeout=60, check=True, env=environment
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
