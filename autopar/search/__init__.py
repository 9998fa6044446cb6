"""From a graph and a cluster to a plan: cost model, problem, exact solver, meshes."""
