"""``python -m megastow.cli``, which is how the demo starts its ranks."""

from megastow.cli import main

main()
