"""Drafts: prompt lookup, the check of drafts against draws, and putting them into the histories. See reference.py."""
