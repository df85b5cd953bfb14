"""What ``megastow bench`` measures: a table of ratios, each against a bound that was measured in the same run.

``bounds`` measures what the machine can do, ``rows`` what megastow does with it, and ``baselines`` what others do.
``registry`` is how a row is declared, ``session`` what rows share, ``run`` the order of things, ``result`` what comes
out. Speed is only ever measured here; tests assert none.
"""
