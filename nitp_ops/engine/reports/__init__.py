"""Pages and tables about objectives: what they are, read, send and hold."""
