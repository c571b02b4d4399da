"""What is written in C, because Python is too slow for it; without a compiler Python does it."""
