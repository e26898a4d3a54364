"""The benchmark of merging and converting; `run` is its command line."""
