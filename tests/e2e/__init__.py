"""A real Airflow, stock and patched: what its tasks leave behind when they are ended in the ways that users end them."""
