"""The second half of law 10, run in a new process: load a training file, take single steps, save."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import adamss
from adamss.backend.registry import using
from adamss_conformance.cases import LAYERS
from adamss_conformance.laws.helpers import single_steps


def main(arguments: list[str]) -> None:
    """Load, train and save, as the arguments say; the suite composes the command line."""
    module, source, name, device, backend_module, backend_source, backend_name, half, steps, out = arguments
    driver_class = _attribute(module, source, name)
    backend_class = _attribute(backend_module, backend_source, backend_name)
    driver = driver_class(backend_class(), device)
    with using(driver.backend), driver.settings("float32"):
        model = adamss.load(driver.model(LAYERS, "float32"), half)
        adamss.save(single_steps(driver, model, int(steps)), out, training=True)


def _attribute(module: str, source: str, name: str) -> Any:
    """Return a class of a module; a test file, which cannot be imported by name, is loaded from its path."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        spec = importlib.util.spec_from_file_location(module, source)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[module] = found
        spec.loader.exec_module(found)
    for part in name.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
