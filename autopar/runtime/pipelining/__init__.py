"""Stages on different groups of ranks."""
