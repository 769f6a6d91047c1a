"""Hooks for training loops whose batches are seen by the model alone: any loop, and transformers' Trainer.

Importing this package loads neither torch nor transformers.
"""
