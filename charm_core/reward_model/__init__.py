"""The torch part: one rendering, scoring and fine-tuning of reward models.

Importing this package imports no torch. ``spec``, ``jobs`` and ``findings`` describe what to do and what was found, ``stored``
looks at files, and both may be imported anywhere; the other modules do it and import torch, transformers and, for training,
DeepSpeed. ``heads`` has one file per kind of reward model, ``preflight`` the rules that are asked before weights are loaded.
"""
