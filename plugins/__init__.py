"""Built-in plugins; they enter by the same hooks as strangers' plugins."""
