"""The small model: how it is built, taught, checked, exported and asked."""
