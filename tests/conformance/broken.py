"""A module that cannot be imported, and not for want of another."""

raise RuntimeError("the driver of the device is too old")
