"""Script of `test_distributed.py`: train and save under DeepSpeed ZeRO-3 on the CPU.

torchrun --nproc-per-node 2 tests/torch/under_deepspeed.py FOLDER
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import pytest
import torch
from torch import nn

import adamss

SETTINGS = {
    "train_batch_size": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}
CONFIG = adamss.AdamssConfig(targets=["0", "2"], rank=8, subspaces=4)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))


def trained(model):
    """Return the DeepSpeed engine after some steps, in which every process has the same batch."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=adamss.trainable_parameters(model), config=SETTINGS
    )
    losses = []
    for _ in range(5):
        loss = (engine(x) - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    return engine(x)


def main(folder):
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    with deepspeed.zero.Init(config_dict_or_path=SETTINGS):
        taken_apart = net()
    assert taken_apart[0].weight.numel() == 0
    outputs = []
    for name, base in (("before", net()), ("after", taken_apart)):
        model = adamss.attach(base, CONFIG)
        y = trained(model)
        outputs.append(y)
        path = f"{folder}/{name}.safetensors"
        adamss.save(model, path)
        assert (
            adamss.summary(model).total.trained == adamss.summary(adamss.attach(net(), CONFIG)).total.trained
        )
        torch.distributed.barrier()
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(adamss.load(net(), path)(x), y)
        with pytest.raises(
            adamss.errors.LayerError, match="0: its weight is taken apart by DeepSpeed ZeRO-3"
        ):
            adamss.merge(model)
    torch.testing.assert_close(*outputs)
    print("ok")


if __name__ == "__main__":
    main(sys.argv[1])
