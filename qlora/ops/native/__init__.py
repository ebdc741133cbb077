"""Kernels in C for CPUs, and what compiles them when they are first wanted."""
