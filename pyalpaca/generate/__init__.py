"""The generate room: a model in any layout talks. Its modules load torch only when something is generated."""
