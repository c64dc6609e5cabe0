"""Sampling: filters, Gumbel-max draws with Philox noise, penalties, log-probabilities. See api.py."""
