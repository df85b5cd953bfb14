"""The checks: what every adapter must do, one function for each invariant or part of one.

Each runs in a worker process on every rank of a group at once, trains a real trainer, and compares with a twin that was
never moved. Checks judge by `megastow_conformance.oracle` alone.
"""
