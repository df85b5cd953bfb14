"""The suite itself: ``pytest --pyargs megastow_conformance``, with a ``--megastow-row`` or a ``--megastow-adapter``."""
