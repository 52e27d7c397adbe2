"""Programs that people start from tasks, each ended in all the ways that a task ends."""
