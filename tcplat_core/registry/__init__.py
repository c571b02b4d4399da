"""Finds plugins and commands, and creates plugins from templates."""
