"""The cascade without its servers: who answers a request, and what it waits for."""
