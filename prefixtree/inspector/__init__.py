"""The tree and the pool in a browser, live or from a file, and in a terminal.

inspector = prefixtree.inspector.serve(cache)
print(inspector.url)
"""

from prefixtree.inspector.server import Inspector, serve

__all__ = ["Inspector", "serve"]
