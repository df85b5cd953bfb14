"""The suite itself: ``pytest --pyargs megastow_conformance.suite``, with at least one ``--megastow-row``."""
