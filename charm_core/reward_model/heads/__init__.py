"""One file per kind of reward model: how it is loaded, how its score comes about and, if it can be trained, how it is saved."""
