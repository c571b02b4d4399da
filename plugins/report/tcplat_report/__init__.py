"""Commands that tell about captures: report, diff and merge."""
