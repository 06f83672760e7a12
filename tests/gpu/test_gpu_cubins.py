"""The fused step as machine code, compiled here for this GPU and launched by trip_rt without Triton, against fp64."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="found no NVIDIA GPU that torch can use")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("model", ["demo", "trip-256", "odd"])
def test_machine_code_launched_by_the_runtime(model, precision, tmp_path):
    from gpu.cases import BOUNDS, ODD, Context, build_kernels, random_fusion
    from gpu.kernel_checks import cubin_error

    from trip_reference.presets import PRESETS

    config = PRESETS[model].trip if model in PRESETS else ODD
    context = Context(dry=False, quick=True, folder=tmp_path)
    (spec,) = build_kernels(context, {"it": (random_fusion(config, "cpu"), config, precision)}).values()
    if isinstance(spec, Exception):
        raise spec
    assert cubin_error(spec, tmp_path, config, 2) <= BOUNDS[precision]
