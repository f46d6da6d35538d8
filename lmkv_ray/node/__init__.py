"""One node's whole service, without Ray: chunks in the arena, tiers below it, peers beside it."""

from lmkv_ray.node.machine import Machine, ThisMachine
from lmkv_ray.node.node import Node

__all__ = ["Machine", "Node", "ThisMachine"]
