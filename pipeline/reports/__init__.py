"""Results as text, plots and HTML pages."""
