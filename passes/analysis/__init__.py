"""What passes ask of a graph: modes, effects, positions, arithmetic. Nothing here is a pass or rewrites anything."""
