"""Tiles for a card that has none: what `penstock tune` measures, and which tile may win."""
