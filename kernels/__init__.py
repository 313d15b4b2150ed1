"""What runs hot: one folder per kind of machine; knows nothing of the model that calls it."""
