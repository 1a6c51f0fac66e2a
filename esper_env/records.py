"""The arrays of all slots as named tuples, which compiled code can read, unlike dataclasses."""

from __future__ import annotations

from esper_env.compilation import record_type
from esper_env.lifecycle import LifecycleState, Measurements

StateRecord = record_type("StateRecord", __name__, LifecycleState)
MeasuredRecord = record_type("MeasuredRecord", __name__, Measurements)
