"""Telemetry: what a run records about itself; see docs/telemetry.md."""
