"""A whole cluster in one process, under simulated time, from one seed.

The real ``Node``, ``DirectoryService``, arena, tiers' protocol, transports and ``Slots`` run on an
event loop whose time is virtual (``loop``). Each simulated process is an ``Incarnation``: it can be
killed or frozen between any two callbacks. The network (``network``) delays, loses and damages what
they say to each other, and can be cut in one direction. Everything random comes from the seed, so a
seed that fails replays exactly:

    python -m tests.simulation --seeds 17 --story

After FoundationDB's simulation and TigerBeetle's VOPR; ``story`` is named after dask's.
"""
