"""What is put into the lane comes out of it, whatever was there before."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from prefixtree.events import lane as module
from prefixtree.events.lane import Lane, LaneReader


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    made.close()


def test_pieces_become_one(lane: Lane) -> None:
    reader = LaneReader(lane.file)
    pieces = [np.arange(size, dtype=np.int32) for size in (3, 0, 5)]
    first, second, third = lane.put(pieces), lane.put([]), lane.put(pieces[:1])
    assert reader.get(first).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert reader.get(second).tolist() == []
    assert reader.get(third).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        reader.get(first)[0] = 1


def test_it_grows_and_shrinks_again(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM", 1 << 12)
    reader = LaneReader(lane.file)
    large = np.arange(9 * module.ROOM, dtype=np.int32)
    for _ in range(3):
        assert not lane.is_full
        places = [lane.put([large]) for _ in range(2)]
        assert lane.is_full
        assert all(np.array_equal(reader.get(place), large) for place in places)
        lane.rewind()
        assert os.fstat(lane.file).st_size == 4 * module.ROOM
        assert reader.get(lane.put([large[5:9]])).tolist() == [5, 6, 7, 8]
        lane.rewind()
