"""The text actor: between edges and engines. See actor.py."""

from penstock.core.actors.text.actor import TextActor as TextActor
