"""All that the author of a plugin declares and is given. Needs no kernel and no root."""
