"""The claim of ``benchmarks/balance.py`` in short: biases that move fast, and few steps.

With 60 steps a bias can move by 60 gamma, so gamma is 20 times that of the full run. Measured with three
seeds on each side: see the thresholds.
"""

import pytest

from benchmarks.balance import run


@pytest.mark.slow
def test_moving_biases_even_the_load_out_that_is_lopsided_without_them() -> None:
    unbalanced = run(gamma=0.0, alpha=0.0, steps=60)
    balanced = run(gamma=0.02, alpha=1e-4, steps=60)

    assert list(balanced.max_violation) == ["layers.1.mlp.gate", "layers.2.mlp.gate", "mtp.0.block.mlp.gate"]
    assert min(unbalanced.max_violation.values()) > 1.5
    assert max(balanced.max_violation.values()) < 1.0
    assert balanced.validation_loss < 1.03 * unbalanced.validation_loss
