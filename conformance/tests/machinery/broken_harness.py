"""A harness that cannot be set up."""


def load():
    """Nothing to load."""


def init_distributed(rank, world, store):
    raise RuntimeError(f"no network for rank {rank}")


def build(scenario):
    raise AssertionError("nothing is built where nothing could start")
