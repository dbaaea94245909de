"""The frozen teacher: loading it and predicting with it."""
