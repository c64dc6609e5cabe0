"""`penstock bench`: load and latency measurements against any OpenAI server, or the engine in process."""
