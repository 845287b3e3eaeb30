"""The drivers of the backends that `adamss` includes."""
