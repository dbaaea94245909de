"""A finished cache as one file, and back."""
