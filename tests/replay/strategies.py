"""Small traces of any shape."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from prefixtree.replay.request import Request

OUTPUT_BASE = 1000


@st.composite
def traces(
    draw: st.DrawFn, max_requests: int = 8, block: int = 2, max_blocks: int = 4
) -> list[Request]:
    """Requests over few blocks of `block` tokens, so that they share much.

    Block 0 to 2 in any order; the last one may be cut short. An output is tokens of its own, or
    goes on as another prompt might.
    """
    requests = []
    for number in range(draw(st.integers(1, max_requests))):
        blocks = draw(st.lists(st.integers(0, 2), min_size=1, max_size=max_blocks))
        total = len(blocks) * block - draw(st.integers(0, block - 1))
        input_length = draw(st.integers(1, total))
        firsts = [block * own for own in blocks]
        lengths = [block] * (len(blocks) - 1) + [total - block * (len(blocks) - 1)]
        if fresh := draw(st.integers(0, 3)):
            firsts.append(OUTPUT_BASE + 10 * number)
            lengths.append(fresh)
        requests.append(
            Request(
                float(number),
                draw(st.integers(0, 3)),
                input_length,
                total + fresh - input_length,
                np.array(firsts, np.int64),
                np.array(lengths, np.int64),
            )
        )
    return requests
