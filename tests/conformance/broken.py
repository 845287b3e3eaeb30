"""A module whose import fails with an error of its own, and not because another module is missing."""

raise RuntimeError("the driver of the device is too old")
