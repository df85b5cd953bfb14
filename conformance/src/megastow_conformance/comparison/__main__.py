"""The command line: ``python -m megastow_conformance.comparison ID=FOLDER...``."""

from megastow_conformance.comparison.table import main

if __name__ == "__main__":
    raise SystemExit(main())
