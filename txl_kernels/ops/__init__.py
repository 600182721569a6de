"""The public ops: each validates, applies autocast, chooses a backend and calls it."""
