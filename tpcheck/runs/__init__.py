"""A run of one's own: recorded in the loop that trains it, and compared with another."""
