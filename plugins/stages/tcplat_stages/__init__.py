"""Where the time goes: exchanges and their stages, from rows of any probes."""
