"""Bugs that are planted in task-sdk/src one after the other, each of which the tests that go upstream have to find."""
