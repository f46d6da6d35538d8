"""A program that never gets ready, as a NIXL process may."""

import threading

if __name__ == "__main__":
    threading.Event().wait()
