"""Several hosts on one machine, joined by a network that can be broken at will.

A host is a set of Linux namespaces: its own network, processes, hostname, /dev/shm, and a
copy-on-write view of this machine's files, so that /tmp, /root and /etc are its own as well. Its
network card is a tap device, and the cable ends in a ``Switch`` of this process, which forwards
frames, or delays, loses or damages them.

Nothing has a name outside of these namespaces and everything ends with process 1 of its host, which
ends when the socket to its maker closes: so nothing can be left, even after ``kill -9`` of pytest,
and there is nothing to sweep. No packet leaves the machine.
"""

from tests.hosts.host import Host, why_not
from tests.hosts.hosts import Hosts
from tests.hosts.remote import Remote
from tests.hosts.switch import Path, Switch

__all__ = ["Host", "Hosts", "Path", "Remote", "Switch", "why_not"]
