"""What a checkpoint or a cache holds."""
