"""A plan's numbers beside one device's, on local processes."""
