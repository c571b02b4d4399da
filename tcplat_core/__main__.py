"""``python -m tcplat_core`` is ``tcplat``."""

from .cli import main

main()
