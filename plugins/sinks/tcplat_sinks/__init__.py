"""The sinks that come with tcplat: table, JSON lines, msgpack, histograms."""
