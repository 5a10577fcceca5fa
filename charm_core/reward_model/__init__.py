"""The torch part: one rendering, scoring and fine-tuning of reward models.

Importing this package imports no torch. ``spec`` and ``jobs`` describe what to do and may be imported anywhere; the other
modules do it and import torch, transformers and, for training, DeepSpeed.
"""
