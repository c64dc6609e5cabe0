"""The edge: HTTP, SSE, and the OpenAI schema on uvloop. Never imports torch."""
