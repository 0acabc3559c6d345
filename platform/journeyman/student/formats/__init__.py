"""A finished student in other formats than its Hugging Face folder, checked on held-out rows."""
