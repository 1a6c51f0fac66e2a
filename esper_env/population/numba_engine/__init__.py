"""Training and evaluation on a CPU, member by member, by compiled kernels."""
