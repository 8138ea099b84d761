"""What a program says to its console: signals, failures, one line each, exit codes."""
