"""What every decision costs in time and memory."""
