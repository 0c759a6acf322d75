from __future__ import annotations

import dataclasses

import pytest

from attnopt.coverage.overrides import OVERRIDES

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("model_type", OVERRIDES)
def test_every_row_names_attributes_that_exist(model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type]
    fields = {f.name for f in dataclasses.fields(config)} | set(config.attribute_map)
    unknown = set(OVERRIDES[model_type]) - fields - {"backbone", "use_timm_backbone", "use_pretrained_backbone"}
    assert not unknown, f"{model_type} has no {unknown}"
