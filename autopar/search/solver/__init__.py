"""From a problem to the best choice: reductions, elimination, bounds and search."""
