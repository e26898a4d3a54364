"""The demo room: a small model of its own, and the whole road walked with it by public commands."""
