"""The tree as what other tools read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from prefixtree.view_text import Decode, text_of

if TYPE_CHECKING:
    import networkx
    import pandas

    from prefixtree.view import TreeView

COLUMNS = "start", "length", "pending", "depth", "pins", "hits", "idle", "age"


def to_dicts(view: TreeView, decode: Decode | None) -> list[dict[str, Any]]:
    """`TreeView.to_dicts` says what this is. O(nodes + tokens)."""
    columns = {name: getattr(view, name).tolist() for name in COLUMNS}
    writers = np.flatnonzero(view.writer)
    serials = view.writer[writers]
    first = np.searchsorted(writers, np.arange(len(view))).tolist()
    stop = np.searchsorted(writers, np.arange(len(view)) + view.size).tolist()
    parents, namespaces = view.parent.tolist(), view.namespace.tolist()
    token_ends, block_ends = view.token_ends.tolist(), view.block_ends.tolist()
    rows = []
    for node in range(len(view)):
        tokens = view.tokens[token_ends[node] : token_ends[node + 1]]
        row: dict[str, Any] = {
            "parent": parents[node] if parents[node] >= 0 else None,
            "namespace": view.namespaces[namespaces[node]],
            **{name: values[node] for name, values in columns.items()},
            "users": serials[first[node] : stop[node]].tolist(),
            "blocks": view.blocks[block_ends[node] : block_ends[node + 1]].tolist(),
            "tokens": tokens.tolist(),
        }
        if decode is not None:
            row["text"] = text_of(tokens, decode)
        rows.append(row)
    return rows


def to_pandas(view: TreeView, decode: Decode | None) -> pandas.DataFrame:
    """`TreeView.to_pandas` says what this is."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas") from error
    rows = to_dicts(view, decode)
    names = ["parent", "namespace", *COLUMNS, "users", "blocks", "tokens"]
    names += ["text"] if decode is not None else []
    data = {name: pandas.Series([row[name] for row in rows], dtype=object) for name in names}
    frame = pandas.DataFrame(data, columns=names)
    frame["parent"] = frame["parent"].astype("Int64")
    return frame.astype(dict.fromkeys(COLUMNS, "int64"))


def to_networkx(view: TreeView, decode: Decode | None) -> networkx.DiGraph[int]:
    """`TreeView.to_networkx` says what this is."""
    try:
        import networkx
    except ImportError as error:
        raise ImportError("to_networkx needs networkx: pip install networkx") from error
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    for at, namespace in enumerate(view.namespaces):
        graph.add_node(~at, namespace=namespace)
    for node, row in enumerate(to_dicts(view, decode)):
        del row["parent"]
        graph.add_node(node, **row)
        graph.add_edge(int(view.parent[node]), node)
    return graph
