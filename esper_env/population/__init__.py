"""Networks that are trained: hosts, seed modules, their storage and the two engines."""
