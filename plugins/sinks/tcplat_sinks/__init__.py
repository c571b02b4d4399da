"""What becomes of the rows: a table to read, JSON lines to keep."""
