"""The tables of the paper, one command each: `glue`, `image`, `generation`, `parameters`."""
