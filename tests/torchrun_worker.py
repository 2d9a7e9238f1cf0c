"""Trains the net of `test_training` in full precision, as one of several processes."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_training import loss_fn, new_net, run
from torch import Tensor, nn

from training import Batch, start_runtime

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    n_examples = 0

    def counting_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        global n_examples
        n_examples += len(batch[0]) if model.training else 0
        return loss_fn(model, batch)

    with start_runtime() as runtime:
        here = replace(runtime, dtype=torch.float32)
        net, best = run(folder, here, new_net(0), loss_fn=counting_loss, grad_accumulation=3)
        found = {"weights": net.state_dict(), "best": best, "examples": n_examples}
        torch.save(found, folder / f"rank{runtime.rank}.pth")
