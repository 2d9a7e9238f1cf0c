"""Trains the net of `test_training` in full precision, as one of several processes."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_training import new_net, run

from training import start_runtime

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with start_runtime() as runtime:
        here = replace(runtime, dtype=torch.float32)
        net, best = run(folder, here, new_net(0), grad_accumulation=3)
        found = {"weights": net.state_dict(), "best": best}
        torch.save(found, folder / f"rank{runtime.rank}.pth")
