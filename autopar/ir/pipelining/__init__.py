"""A graph over time: microbatches, stages, schedules."""
