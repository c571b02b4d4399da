"""TCP packets as the network card hands them over."""
