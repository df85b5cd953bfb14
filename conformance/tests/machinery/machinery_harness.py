"""A harness without Megatron: the machinery is tested with real processes and a real process group only."""


class Trainer:
    """Only what the machinery itself touches."""

    def __init__(self, scenario):
        self.scenario = scenario
        self.model = []
        self.optimizer = None

    def close(self):
        print("trainer closed", flush=True)


def load():
    """Nothing to load."""


def init_distributed(rank, world, store):
    import torch  # not above: the process that runs pytest is to stay without it

    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)


def build(scenario):
    return Trainer(scenario)


def lacks(version, device):
    found = {"hybrid": f"no hybrid in {version}", "sharded_checkpoint+overlap": "shards do not overlap"}
    return found if device == "cpu" else {}
