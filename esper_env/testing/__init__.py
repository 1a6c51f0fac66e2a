"""Checker for vector environments: conformance with Gymnasium's interface."""
