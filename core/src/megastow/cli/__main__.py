"""``python -m megastow.cli``, which is how ``launch`` starts ranks."""

from megastow.cli import main

main()
