"""Which cause explains a suspect: each is named only where its own numerical test holds."""
