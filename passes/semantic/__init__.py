"""Passes over the Dynamo graph: what is computed is decided here, and can be read in a dump."""
