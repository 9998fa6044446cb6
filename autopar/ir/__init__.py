"""The language of autopar: graphs, placements, sharding rules, clusters and plans; and the tracer that reads a model into it."""
