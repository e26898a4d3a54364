"""The benchmarks: each prints a table and, as its last line, one JSON object (docs/architecture.md, "The last line")."""
