"""Random process trees, ended in random ways under a real supervisor, against a model of what may be left."""
