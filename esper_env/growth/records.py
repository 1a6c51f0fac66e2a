"""The arrays of all slots as named tuples, which compiled code can read, unlike dataclasses."""

from __future__ import annotations

from esper_env.growth.lifecycle import LifecycleState, Measurements
from esper_env.jit import record_type

StateRecord = record_type("StateRecord", __name__, LifecycleState)
MeasuredRecord = record_type("MeasuredRecord", __name__, Measurements)
