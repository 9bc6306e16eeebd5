"""Graph passes, one per file, imported as ``cggr_compile.passes``; ``cggr_compile.pipeline`` declares the order."""
