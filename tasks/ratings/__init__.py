"""Where ratings come from: fetching, reading, snapshots, what changed."""
