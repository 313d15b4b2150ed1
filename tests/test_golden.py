"""The whole network against logits that Hugging Face transformers computed in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops

Golden = Callable[[Path], dict[str, NDArray[Any]]]


def row_errors(model: GptOss, reference: dict[str, NDArray[Any]]) -> dict[tuple[str, int], float]:
    """Relative error ||logits - reference|| / ||reference|| of every (prompt, row)."""
    errors = {}
    for key in (key for key in reference if key.startswith("logits_")):
        want = reference[key]
        got = model.logits(reference[key.replace("logits", "tokens")].tolist(), last=len(want))
        for row, error in enumerate(np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)):
            errors[key, row] = float(error)
    return errors


def test_reference_is_transformers_to_float32_rounding(layout: Path, golden: Golden) -> None:
    model = GptOss(open_checkpoint(layout), get_ops("reference"))
    # Two float32 evaluations in different order differ by about 1e-6.
    assert max(row_errors(model, golden(layout)).values()) <= 2e-5


def test_cpu_is_within_bf16_keys_and_values_of_transformers(network: list[Path], golden: Golden) -> None:
    worst: dict[tuple[str, int], float] = {}
    for layout in network:
        model = GptOss(open_checkpoint(layout), get_ops("cpu"))
        errors = row_errors(model, golden(layout))
        assert np.median(list(errors.values())) <= 2e-3
        assert np.quantile(list(errors.values()), 0.9) <= 1e-2
        worst = {key: max(error, worst.get(key, 0.0)) for key, error in errors.items()}
    # A router near-tie that flips shows as one row above 0.1; a wrong window or sink shows as many.
    assert np.mean(np.array(list(worst.values())) > 0.1) <= 0.05


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_best_token_follows_the_reference_where_the_gap_is_clear(
    layout: Path, golden: Golden, device: str
) -> None:
    reference = golden(layout)
    prompt, greedy = reference["tokens_7"].tolist(), reference["greedy_7"].tolist()
    model = GptOss(open_checkpoint(layout), get_ops(device))
    logits = model.logits(prompt + greedy[:-1], last=len(greedy))
    clear = reference["greedy_gap"] > 0.1
    np.testing.assert_array_equal(logits.argmax(axis=1)[clear], np.array(greedy)[clear])
