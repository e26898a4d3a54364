"""The benchmark of the operators, beside the machine's limits and their peers; `run` is its command line."""
