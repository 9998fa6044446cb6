"""Families of operators that share one shape of loop nest: functions from a call to its `Nest`, or None where there is none for it."""
