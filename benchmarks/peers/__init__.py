"""What one would run instead of this project."""
