"""The courier: the process through which an engine talks to the cache's Ray actors.

A process that joins a Ray cluster ends about a minute after the cluster's head has gone, and Ray
takes over its signals. An engine must not: so a process beside it joins the cluster and carries
its messages. It may die at any moment; another one is started when the engine's link asks next.
``client`` is the engine's side and imports no Ray, ``process`` is the program.
"""

from lmkv_ray.courier.client import Courier

__all__ = ["Courier"]
