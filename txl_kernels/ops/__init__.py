"""The public ops: each validates its arguments, applies autocast, chooses a backend and calls it."""
