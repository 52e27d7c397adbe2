"""Airflow's own task runner on real tasks, which are ended in all the ways there are."""
