"""``with fake_te():`` ``import transformer_engine`` finds ``fake_transformer_engine``, and this machine will do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from lightning_dualpipe.precision import te_backend

FAKE = Path(__file__).parent / "fake_transformer_engine"


@contextmanager
def fake_te() -> Iterator[None]:
    real = _forget()
    sys.path.insert(0, str(FAKE))
    try:
        with mock.patch.object(te_backend, "why_not_te", lambda recipe: None):
            yield
    finally:
        sys.path.remove(str(FAKE))
        _forget()
        sys.modules.update(real)


def _forget() -> dict:
    names = [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]
    return {name: sys.modules.pop(name) for name in names}
