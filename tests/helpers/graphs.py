"""What stands in for CUDA graphs where there is no GPU."""

import types

import torch


class StandIn:
    """Records nothing but what to run, and has a clock that the test sets."""

    def __init__(self, *, fails=None, takes=True, runs=False):
        self.fails, self.takes_device, self.runs = fails, takes, runs
        self.now, self.replays, self.resets, self.releases = 0.0, 0, 0, 0

    def takes(self, device):
        return self.takes_device

    def record(self, run):
        if self.fails is not None:
            raise self.fails
        if self.runs:
            run()

        def replay():
            self.replays += 1
            with torch.enable_grad():  # in a backward there is none, and a graph does not ask
                run()

        def reset():
            self.resets += 1

        return types.SimpleNamespace(replay=replay, reset=reset)

    def release(self):
        self.releases += 1

    def pool_bytes(self):
        return 3 * 2**20

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start
