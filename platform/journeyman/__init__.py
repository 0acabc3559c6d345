"""Journeyman: distil a large language model into a small one, serve both as a certified cascade.

Importing this package loads neither Ray, torch nor vLLM; each is imported where it is used.
"""

__version__ = "0.1.0"
