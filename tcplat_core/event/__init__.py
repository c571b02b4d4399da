"""One row: its fields, its record in C, its texts, its clock."""
