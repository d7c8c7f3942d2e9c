"""The memory that measuring takes does not depend on how many layers there are."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import models

CORE = ("stream", "neurons", "weights", "random_input")


def _peak(folder: Path) -> int:
    """Of a measurement in a process of its own, which keeps nothing for later."""
    code = (
        "from streamgauge import measure; from streamgauge.engine import memory; "
        "memory.KEPT = memory.GROWN = 0; "
        f"print(measure({str(folder)!r}, groups={CORE!r}).metadata['peak_private_bytes'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "dtype"), [("gpt-neox-parallel", torch.float32), ("llama", torch.bfloat16)]
)
def test_memory_does_not_grow_with_depth(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    width, peaks = 640, []
    for depth in (2, 18):
        config = models.ARCHITECTURES[name].config()
        config.update(
            {
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "num_hidden_layers": depth,
                "num_key_value_heads": 4,
            }
        )
        model = models.tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
        peaks.append(_peak(models.save(model, tmp_path / str(depth))))
    block = 4 * 12 * width**2  # bytes in fp32, about: attention 4 width², MLP 8 or 12 width²
    # Sixteen more blocks would be sixteen more if they were held, and four if only the copies of
    # their fused tensors were.
    assert peaks[1] - peaks[0] < 3 * block
