"""Script that `test_trainer.py` runs with ``accelerate launch``: the Trainer on two processes, and resuming."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from adamss import AdamssWarning

spec = importlib.util.spec_from_file_location("test_trainer", Path(__file__).with_name("test_trainer.py"))
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)


def same_on_all(model: torch.nn.Module) -> None:
    for name, tensor in here.ours(model).items():
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor), f"{name} differs on process {dist.get_rank()}"


def main(folder: Path) -> None:
    warnings.filterwarnings("error", category=AdamssWarning)
    options = {"per_device_train_batch_size": 2, "max_grad_norm": 0.5}
    whole, callback = here.trained(here.adapted(), folder / "run", **options)
    assert dist.get_world_size() == 2
    assert callback.controller.active_count == 3
    same_on_all(whole.model)
    dist.barrier()

    resumed, _ = here.trained(
        here.adapted(), folder / "again", resume=folder / "run" / "checkpoint-3", **options
    )
    same_on_all(resumed.model)
    here.assert_same_state(here.ours(whole.model), here.ours(resumed.model))
    (folder / f"done-{dist.get_rank()}").touch()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
