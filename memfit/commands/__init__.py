"""Bodies of commands that have too many options to stand in `memfit.cli`."""
