"""Pre-flight: what is wrong with a reward model, found in seconds and before its weights are loaded.

Every rule is a function from facts to findings. ``stored.checks`` has those that look at files alone, and which loading
obeys too; here are those that look at the tokenizer, the template, the settings and a sample of the texts.
"""
