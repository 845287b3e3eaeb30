"""Test several processes: DistributedDataParallel, FSDP2, accelerate, and attaching together.

The processes run on_two_processes.py. A group of processes is started once for all scenarios, and again after a
failure, because starting Python and importing torch takes longer than most scenarios.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import on_two_processes as worker
import pytest
import torch
from torch import nn

import adamss
from adamss import BudgetConfig, errors
from adamss_torch import BudgetController
from adamss_torch.backend import UNSYNCHRONISED

HERE = Path(__file__).parent
SECONDS = 120
"""Time after which processes that do not answer are killed. No scenario takes a tenth of it."""

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)
# FSDP2 has run on the CPU since PyTorch 2.7.
FSDP_RUNS = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 7)
ON_FOUR = [name for name in worker.FOUR_PROCESSES if FSDP_RUNS]
ON_TWO = [n for n in worker.SCENARIOS if n not in worker.FOUR_PROCESSES and (FSDP_RUNS or "fsdp_" not in n)]


def environment() -> dict[str, str]:
    """Return an environment in which processes communicate only over the loopback interface."""
    on_loopback = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | on_loopback | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Processes:
    """A group of processes that run scenarios together; the first scenario starts them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.launches = folder, count, 0
        self.running: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        self.here = self.folder / str(self.launches)
        self.here.mkdir()
        self.launches += 1
        for rank in range(self.count):
            command = [
                sys.executable,
                str(HERE / "on_two_processes.py"),
                str(rank),
                str(self.count),
                str(self.here),
            ]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with open(self.here / f"{rank}.log", "w") as log:
                process = subprocess.Popen(command, env=environment(), stderr=log, **pipes)
            self.running.append(process)

    def end(self) -> list[int]:
        """Kill the processes, and return their exit statuses."""
        for process in self.running:
            process.kill()
        statuses = [process.wait() for process in self.running]
        for process in self.running:
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()
        self.running = []
        return statuses

    def run(self, name: str) -> list[str]:
        """Run a scenario, and return the traceback of each process; an empty string means success."""
        if not self.running:
            self.start()
        for process in self.running:
            with suppress(BrokenPipeError):
                process.stdin.write(name + "\n")
                process.stdin.flush()
        until = time.monotonic() + SECONDS
        found = [self.answer(rank, until) for rank in range(self.count)]
        if any(found):
            self.end()
        return found

    def answer(self, rank: int, until: float) -> str:
        """Return the answer of a process; without one, a message with the output that it has printed."""
        process = self.running[rank]
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        if ready and (line := process.stdout.readline()):
            return json.loads(line)
        state = f"ended with {process.wait()}" if ready else "did not answer"
        return f"process {rank} {state}:\n{(self.here / f'{rank}.log').read_text()[-3000:]}"


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int, str], None]]:
    """Return a function that runs a scenario on a number of processes, and fails with their tracebacks."""
    groups: dict[int, Processes] = {}

    def run(count: int, name: str) -> None:
        if count not in groups:
            groups[count] = Processes(tmp_path_factory.mktemp("together"), count)
        failures = groups[count].run(name)
        # A process was once ended by a signal (`free(): invalid size`, in FSDP2's gather on gloo). The reason was not
        # found, and valgrind reports nothing for any scenario. A scenario that ends by a signal is run once more.
        if any("ended with -" in text for text in failures):
            failures = groups[count].run(name)
        assert not any(failures), "\n".join(filter(None, failures))

    yield run
    for group in groups.values():
        group.end()


@pytest.mark.parametrize("name", ON_TWO)
def test_on_two_processes(together, name):
    together(2, name)


@pytest.mark.parametrize("name", ON_FOUR)
def test_on_four_processes(together, name):
    together(4, name)


def test_every_scenario_is_run():
    assert {*ON_TWO, *ON_FOUR} == {*worker.SCENARIOS} or not FSDP_RUNS


def test_under_accelerate(tmp_path, on_two_processes):
    output = on_two_processes("under_accelerate.py", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"accelerate-0", "accelerate-1"}, output[-3000:]


def test_ddp_is_told_to_leave_the_buffers_alone_until_detach(net, config):
    model = adamss.attach(net(), config())
    names = {name for name, _ in model.named_buffers()}
    assert names <= set(getattr(model, UNSYNCHRONISED))
    assert {name.rpartition(".")[2] for name in getattr(model, UNSYNCHRONISED)} == {"A"}
    adamss.detach(model)
    assert not hasattr(model, UNSYNCHRONISED)


def test_a_list_for_ddp_that_is_there_is_kept(net, config):
    model = net()
    theirs = ["layers.0.query.bias", "layers.0.query.adamss.default.A"]
    setattr(model, UNSYNCHRONISED, theirs)
    adamss.attach(model, config())
    assert getattr(model, UNSYNCHRONISED)[:2] == theirs
    assert len(set(getattr(model, UNSYNCHRONISED))) == len(getattr(model, UNSYNCHRONISED))
    adamss.detach(model)
    assert getattr(model, UNSYNCHRONISED) == theirs
    assert theirs == ["layers.0.query.bias", "layers.0.query.adamss.default.A"]


def of_deepspeed(name: str, **attributes) -> object:
    """Return an object whose class claims to be from DeepSpeed."""
    return type(name, (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2", **attributes})()


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "within accelerate's wrapper"])
def test_optimisers_of_deepspeed_are_refused(net, config, wrapped):
    model = adamss.attach(net(), config())
    inner = torch.optim.AdamW(adamss.trainable_parameters(model))
    optimizer = of_deepspeed("DeepSpeedZeroOptimizer", optimizer=inner)
    if wrapped:
        optimizer = type("DeepSpeedOptimizerWrapper", (), {"optimizer": optimizer})()
    with pytest.raises(errors.ConfigTypeError, match=r"DeepSpeed.*fully_shard"):
        BudgetController(model, optimizer, BudgetConfig(target=4, end_step=4))
    # The refusal has changed nothing, so the inner PyTorch optimiser is accepted.
    BudgetController(model, inner, BudgetConfig(target=4, end_step=4)).remove()


def test_a_convolution_that_deepspeed_has_partitioned_is_refused(config):
    model = nn.Sequential(nn.Conv1d(6, 6, 3))
    model[0].weight.ds_id = 3
    with pytest.raises(
        errors.LayerError, match=r"0 is a Conv1d whose weight DeepSpeed ZeRO-3 has taken apart"
    ):
        adamss.attach(model, config(targets=["0"]))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_under_deepspeed(tmp_path, processes):
    """Adapters are attached before and after ZeRO-3 partitions the weights, trained, saved, and loaded elsewhere."""
    pytest.importorskip("deepspeed")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    done = subprocess.run(
        [*command, str(HERE / "under_deepspeed.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == processes
