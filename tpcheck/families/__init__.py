"""Small random models of the model types of transformers. Importing this loads no torch."""
