"""Gymnasium's side: the environments, wrappers, info, rendering and registration."""
