"""Each TCP segment that is sent again: a probe for tcplat, from outside of it."""
