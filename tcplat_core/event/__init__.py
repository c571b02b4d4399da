"""One row of what was seen: its fields, its record in C, its texts, its clock."""
