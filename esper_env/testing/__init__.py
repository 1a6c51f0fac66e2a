"""Checks that a vector environment keeps the promises of Gymnasium's interface."""
