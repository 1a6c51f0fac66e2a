"""Benchmarks: scripts that measure, and the plain networks they compare with."""
