"""What a front end and its engine's process say to each other before the first frame: one JSON text
each, and its length before it."""

from __future__ import annotations

import struct

from fastpage import _C

LENGTH = struct.Struct("=Q")
# Both are to be of one build. They are not once the package has been replaced under a running
# server: a process that is started then is of the new one.
BUILD = f"fastpage {_C.__version__}, channel {_C.__channel_version__}"


def other_build(engine: object, front_end: object) -> str:
    return (
        f"its process is of [{engine}], and the server of [{front_end}]: the package was replaced "
        "meanwhile; start the server again"
    )
