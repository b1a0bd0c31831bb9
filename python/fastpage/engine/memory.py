"""How much memory there is, and how people write amounts of it."""

from __future__ import annotations

import re
from pathlib import Path

from fastpage.errors import InvalidArgument

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_TOO_MUCH = 1 << 60
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_bytes(value: int | str, name: str) -> int:
    """`value` in bytes: an int, or text such as "2GiB", "1.5g", "800 MB"."""
    size: float
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        pattern = r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kmgt]i?)?b?\s*"
        match = re.fullmatch(pattern, value.lower()) if isinstance(value, str) else None
        if not match:
            raise InvalidArgument(f"{name}={value!r} is not an amount of memory such as 2GiB")
        unit = match[2] or ""
        size = min(float(match[1]) * (_BINARY.get(unit) or _UNITS[unit]), _TOO_MUCH)
    if size < 1:
        raise InvalidArgument(f"{name}={value!r}: must be more than 0 bytes")
    if size >= _TOO_MUCH:
        raise InvalidArgument(f"{name}: must be less than {format_bytes(_TOO_MUCH)}")
    return int(size)


def format_bytes(size: int) -> str:
    if size < 1024:
        return f"{size} bytes"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size / 1024:.4g} KiB"


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its cgroup's if that is less."""
    sizes = [_meminfo_available()]
    sizes += [limit - used for limit, used in _cgroup_limits()]
    return max(0, min(sizes))


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise InvalidArgument("/proc/meminfo does not say what memory is free: set kv_cache_memory")


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used without reclaimable cache) of every cgroup around this process, v2 and v1."""
    pairs = []
    for line in _read_lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, cache = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache = "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        mount = Path("/sys/fs/cgroup") / root
        group = mount / path.lstrip("/")
        # Inside a container the path may be the host's, while the mount shows the container's own.
        for folder in {group, *group.parents, mount}:
            if mount not in (folder, *folder.parents):
                continue
            bounds = _read_int(folder / limit), _read_int(folder / used)
            if bounds[0] is None or bounds[1] is None:
                continue
            reclaimable = 0
            for stat in _read_lines(folder / "memory.stat"):
                if stat.startswith(cache + " "):
                    reclaimable = int(stat.split()[1])
            pairs.append((bounds[0], bounds[1] - reclaimable))
    return pairs


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _read_int(path: Path) -> int | None:
    """The number in a file; None if there is no such file, or it says "max"."""
    lines = _read_lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None
