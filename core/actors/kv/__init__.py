"""The KV manager: see manager.py."""

from penstock.core.actors.kv.manager import KvManager as KvManager
