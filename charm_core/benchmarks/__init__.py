"""Benchmarks: one file each, how items become numbers. Reading files and scoring texts is done elsewhere."""
