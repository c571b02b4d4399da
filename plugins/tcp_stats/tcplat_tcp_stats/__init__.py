"""What the kernel's socket has counted, once per connection."""
