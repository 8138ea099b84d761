"""Which objectives, with which options: grammar, schedules, validation."""
