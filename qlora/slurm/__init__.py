"""Batch scripts for SLURM: one function renders a script, another hands it over. Torch-free."""
