"""Passes over AOTAutograd's joint graph: exact with respect to the graph that they get."""
