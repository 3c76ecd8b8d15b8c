"""The grid behind reproduce_tables.py: what is fitted, what is measured, and the tables made of it."""
