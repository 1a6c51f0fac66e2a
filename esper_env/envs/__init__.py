"""Gymnasium interface: environments, wrappers, info, rendering and registration."""
