import pytest

pytest.importorskip("msgspec")
pytest.importorskip("zmq")
