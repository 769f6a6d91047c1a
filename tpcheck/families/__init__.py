"""Small random models of the model types of transformers; mostly data."""
