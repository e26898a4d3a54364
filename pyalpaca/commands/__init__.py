"""The commands that people type, one file each; nothing heavy is imported before it is needed."""
