"""Sharding rules: for every operator, the ways to run it on the ranks of one mesh axis."""
