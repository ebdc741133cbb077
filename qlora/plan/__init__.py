"""What a job will need, before anything is loaded: memory and traffic of a rank, by arithmetic. Torch-free."""
