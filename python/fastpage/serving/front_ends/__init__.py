"""Several front-end processes over one engine: a parent that owns the engine's process and serves
nobody, and children that serve.

    parent ── control ── front end 0 ══ engine's socket ══╗
       ║ ──── control ── front end 1 ══ engine's socket ══╬══ engine
       ╚════════════════════════ engine's socket ═════════╝
"""
