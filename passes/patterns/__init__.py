"""What passes recognise in a graph."""
