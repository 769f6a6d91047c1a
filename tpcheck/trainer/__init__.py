"""Hooks for training loops whose batches are seen by the model alone: any loop, transformers' and Lightning's.

Importing this package loads neither torch nor any of them.
"""
