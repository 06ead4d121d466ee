"""The way of an encoded image: read once into memory, and that very memory is what DALI decodes."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ii_dist.config import DataConfig
from ii_dist.data import Index, make_train_source
from ii_dist.runtime import World
from tests.images import make_data_set, plan_of, run_config

BATCH = 4


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Where encoded images were when they were read, and when the decoder got them."""
    nvidia_dali = pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn

    found: dict[str, list[int]] = {"read": [], "decoded": []}
    read_bytes = Index.read_bytes

    def reading(self: Index, row: int) -> NDArray[np.uint8]:
        content = read_bytes(self, row)
        found["read"].append(content.ctypes.data)
        return content

    def decoding(encoded: NDArray[np.uint8], start: NDArray[np.int32], shape: NDArray[np.int32]) -> NDArray[np.uint8]:
        found["decoded"].append(encoded.ctypes.data)
        return np.zeros((shape[1], shape[0], 3), dtype=np.uint8)

    def image_slice(encoded: Any, start: Any, shape: Any, **_: Any) -> Any:
        return fn.python_function(encoded, start, shape, function=decoding, output_layouts="HWC")

    class InTurn(nvidia_dali.Pipeline):  # type: ignore[misc, name-defined]
        """Operators in Python want a pipeline without threads of its own."""

        def __init__(self, **arguments: Any) -> None:
            arguments |= {"exec_dynamic": False, "exec_async": False, "exec_pipelined": False}
            super().__init__(**{name: arguments[name] for name in arguments if name != "prefetch_queue_depth"})

    monkeypatch.setattr(Index, "read_bytes", reading)
    monkeypatch.setattr(fn.decoders, "image_slice", image_slice)
    monkeypatch.setattr(nvidia_dali, "Pipeline", InTurn)
    return found


def test_dali_decodes_the_very_memory_that_was_read_into(tmp_path: Path, addresses: dict[str, list[int]]) -> None:
    cfg = DataConfig(root=str(make_data_set(tmp_path, 2, 6, 1, (60, 44))), image_size=16, threads_per_rank=1)
    plan = plan_of(run_config(cfg, BATCH), 1, 12, 2, 2)
    source = make_train_source(cfg, plan, World(), 0, "cpu", False)
    batches = iter(source)
    for _ in range(3):
        next(batches)
    source.close()
    assert len(addresses["decoded"]) >= 3 * BATCH
    # Threads read: within a batch in any order.
    assert not Counter(addresses["decoded"]) - Counter(addresses["read"])
