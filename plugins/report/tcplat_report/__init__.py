"""Commands for captures: report, diff and merge."""
