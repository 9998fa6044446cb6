"""From a plan to a rank program: lowering, collectives, parameters, gradient synchronisation, verification."""
