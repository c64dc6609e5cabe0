"""`penstock tune`: tiles for a GPU that has none, measured once and kept."""
