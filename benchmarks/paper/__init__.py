"""Commands that reproduce the tables of the paper: `glue`, `image`, `generation` and `parameters`."""
