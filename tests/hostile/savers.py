"""Processes that save to one path, collide and are killed. test_hostile.py runs this script in a separate process.

The script forks, which is not safe in a process with the threads of a framework. ::

    python savers.py kill FOLDER KILLS
    python savers.py collide FOLDER ROUNDS
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import adamss
from adamss.backend import NumpyLinear, NumpyModel
from adamss.io import checkpoint

NAME = "adapter.safetensors"


def adapted(seed):
    """Return a model whose file has a few hundred kilobytes, so that writing it takes a moment."""
    rng = np.random.default_rng(0)
    model = NumpyModel({f"layer.{i}.query": NumpyLinear(rng.standard_normal((200, 160))) for i in range(2)})
    model = adamss.attach(
        model, adamss.AdamssConfig(targets=["query"], rank=60, subspaces=4, subspace_rank=20)
    )
    for factors in model.bank.only().layers.values():
        factors.C[...] = np.random.default_rng(seed).standard_normal(factors.C.shape)
    return model


def references(folder):
    """Return two models, and the content of their files."""
    models = [adapted(1), adapted(2)]
    for number, model in enumerate(models):
        adamss.save(model, folder / f"reference-{number}.safetensors")
    files = [checkpoint.read(folder / f"reference-{number}.safetensors") for number in range(2)]
    for number in range(2):
        (folder / f"reference-{number}.safetensors").unlink()
    return models, files


def which(path, files):
    """Return the index of the file whose content is at the path; None if it is neither."""
    try:
        found = checkpoint.read(path)
    except adamss.AdamssError:
        return None
    return files.index(found) if found in files else None


def child(action):
    """Run an action in a forked process, which then exits with status 0, or 1 if the action failed."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        action()
        status = 0
    finally:
        os._exit(status)


def kill(folder, kills):
    """Kill processes that save the two models by turns, at random moments."""
    models, files = references(folder)
    path, rng = folder / NAME, np.random.default_rng(0)
    found = {"first": 0, "second": 0, "neither": 0, "interrupted": 0, "most_temporaries": 0}
    start = time.perf_counter()
    os.waitpid(child(lambda: adamss.save(models[0], path)), 0)
    once = time.perf_counter() - start  # with the fork, so that a busy machine gets longer delays
    for turn in range(kills):

        def save_on(turn=turn):
            while True:
                for number in (turn, turn + 1):
                    adamss.save(models[number % 2], path)

        pid = child(save_on)
        time.sleep(rng.uniform(0, 4 * once))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        number = which(path, files)
        found["neither" if number is None else ("first", "second")[number]] += 1
        temporaries = len(os.listdir(folder)) - 1
        found["interrupted"] += temporaries > 0
        found["most_temporaries"] = max(found["most_temporaries"], temporaries)
    adamss.save(models[0], path)
    return found | {"left": os.listdir(folder)}


def collide(folder, rounds):
    """Let two processes save to one path while a third reads it."""
    models, files = references(folder)
    path, winners = folder / NAME, []
    adamss.save(models[0], path)
    failed = 0

    def read_on():
        while True:
            if which(path, files) is None:
                return

    reader = child(read_on)
    for _ in range(rounds):
        gate, opened = os.pipe()

        def save(model, gate=gate, opened=opened):
            os.close(opened)
            os.read(gate, 1)  # both processes start when the parent closes the other end
            for _ in range(3):
                adamss.save(model, path)

        pids = [child(lambda model=model: save(model)) for model in models]
        os.close(opened)
        failed += sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
        os.close(gate)
        winners.append(which(path, files))
    # The reader ends by itself only if it has read something other than one of the two files.
    ended, _ = os.waitpid(reader, os.WNOHANG)
    if not ended:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
    return {
        "rounds": rounds,
        "neither": winners.count(None) + bool(ended),
        "failed": failed,
        "left": os.listdir(folder),
        "both_won": {0, 1} <= set(winners),
    }


if __name__ == "__main__":
    mode, folder, count = sys.argv[1:]
    print(json.dumps({"kill": kill, "collide": collide}[mode](Path(folder), int(count))))
