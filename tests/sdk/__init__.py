"""The tests of task-sdk/tests on real releases, and upstream's tests of the same module beside them."""
