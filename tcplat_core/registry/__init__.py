"""Which plugins and commands there are, and new ones from templates."""
