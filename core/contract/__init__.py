"""What a plugin author reads: hooks, specs, and what devices, policies, tokenizers and renderers offer."""
