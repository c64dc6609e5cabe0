"""Suffix automata over tokens: the longest run at a text's end that was there before, known after every token. See reference.py."""

from penstock.kernels.suffixes.api import Automaton, Readers, Suffixes, suffixes

__all__ = ["Automaton", "Readers", "Suffixes", "suffixes"]
