"""The teacher: one vLLM engine, what is captured from it, and the tasks that it is asked."""
