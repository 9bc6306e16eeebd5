"""Triton kernels. Importing this package does not import triton; importing one of its modules does."""
