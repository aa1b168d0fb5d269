"""What the fused head refuses, and in which words."""

from __future__ import annotations

import re

import pytest
import torch
from head_checks import (
    arguments_of,
)

import tdpo_ext

REFUSED = {
    "widths differ": ({"policy_weight": torch.randn(9, 4)}, ValueError, "policy_weight.*H"),
    "reference's width": ({"reference_weight": torch.randn(9, 4)}, ValueError, "reference_weight"),
    "vocabularies differ": (
        {"reference_weight": torch.randn(8, 3)},
        ValueError,
        "reference_weight.*9",
    ),
    "dtypes differ": ({"policy_weight": torch.randn(9, 5).bfloat16()}, TypeError, "policy_weight"),
    "integers": (
        {"policy_hidden": torch.zeros(4, 6, 5, dtype=torch.int64)},
        TypeError,
        "policy_hidden",
    ),
    "tokens differ": ({"reference_hidden": torch.randn(4, 5, 3)}, ValueError, "reference_hidden"),
    "no matrix": ({"policy_weight": torch.randn(5)}, ValueError, r"policy_weight.*\[V, H\]"),
    "bias": ({"policy_bias": torch.randn(8)}, ValueError, "policy_bias"),
    "reference's bias": ({"reference_bias": torch.randn(9).double()}, TypeError, "reference_bias"),
    "no tensor": ({"reference_weight": None}, TypeError, "reference_weight"),
    "reference requires grad": (
        {"reference_weight": torch.randn(9, 3, requires_grad=True)},
        ValueError,
        "reference_weight.*detach",
    ),
    "one in float64": (
        {
            "reference_hidden": torch.randn(4, 6, 3).double(),
            "reference_weight": torch.randn(9, 3).double(),
        },
        TypeError,
        "float64",
    ),
    "another device": ({"policy_weight": torch.randn(9, 5, device="meta")}, ValueError, "device"),
    "the reference on another device": (
        {
            "reference_hidden": torch.randn(4, 6, 3, device="meta"),
            "reference_weight": torch.randn(9, 3, device="meta"),
        },
        ValueError,
        "reference_hidden must be on the device of policy_hidden",
    ),
    "no vocabulary": (
        {"policy_weight": torch.randn(0, 5), "reference_weight": torch.randn(0, 3)},
        ValueError,
        "V, H >= 1",
    ),
    "reference's bias requires grad": (
        {"reference_bias": torch.randn(9, requires_grad=True)},
        ValueError,
        "reference_bias.*detach",
    ),
    "labels": ({"labels": torch.zeros(4, 5, dtype=torch.int64)}, ValueError, "labels"),
    "labels on another device": (
        {"labels": torch.zeros(4, 6, dtype=torch.int64, device="meta")},
        ValueError,
        "labels must be on the device",
    ),
    "label too large": ({"labels": torch.full((4, 6), 9)}, IndexError, "labels.*got 9"),
    "scale": ({"logit_scale": float("inf")}, ValueError, "logit_scale"),
    "reference's scale": (
        {"reference_logit_scale": float("nan")},
        ValueError,
        "reference_logit_scale",
    ),
    "softcap infinite": ({"logit_softcap": float("inf")}, ValueError, "logit_softcap"),
    "softcap 0": ({"logit_softcap": 0.0}, ValueError, "logit_softcap"),
    "softcap negative": ({"reference_logit_softcap": -1.0}, ValueError, "reference_logit_softcap"),
    "softcap a string": ({"logit_softcap": "30"}, TypeError, "logit_softcap"),
    "ignore_index a float": ({"ignore_index": -100.0}, TypeError, "ignore_index"),
    "chunk_bytes 0": ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
    "chunk_bytes a bool": ({"chunk_bytes": True}, TypeError, "chunk_bytes"),
    "chunk_bytes float": ({"chunk_bytes": 1e6}, TypeError, "chunk_bytes"),
}


@pytest.mark.parametrize("module", [tdpo_ext, tdpo_ext.reference], ids=["ours", "reference"])
@pytest.mark.parametrize(
    "name", ["linear_token_stats", "linear_token_divergences", "linear_tdpo_loss"]
)
@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, name, module):
    changes, error, message = REFUSED[case]
    given = arguments_of(4, 6, vocabulary=9, width=5, reference_width=3)
    given |= {"labels": torch.zeros(4, 6, dtype=torch.int64), **changes}
    with pytest.raises(error) as caught:
        getattr(module, name)(**given)
    assert re.search(message, str(caught.value), re.DOTALL), caught.value


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 6), "policy_hidden.*even"), ((6,), "policy_hidden.*cu_seqlens")]
)
def test_the_loss_refuses_what_are_no_pairs(shape, message):
    given = arguments_of(*shape, vocabulary=9)
    with pytest.raises(ValueError, match=message):
        tdpo_ext.linear_tdpo_loss(**given, labels=torch.zeros(*shape, dtype=torch.int64))


@pytest.mark.parametrize("module", [tdpo_ext, tdpo_ext.reference], ids=["ours", "reference"])
@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("reduction", "batchmean"),
        ("variant", "tdpo3"),
        ("beta", 0.0),
        ("alpha", -0.1),
        ("label_smoothing", 0.5),
    ],
)
def test_the_loss_refuses_options(option, wrong, module):
    given = arguments_of(4, 6, vocabulary=9) | {option: wrong}
    with pytest.raises(ValueError, match=option):
        module.linear_tdpo_loss(**given, labels=torch.zeros(4, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("option", "wrong"),
    [("logit_scale", float("nan")), ("logit_softcap", -1.0), ("chunk_bytes", -1), ("beta", -1.0)],
)
def test_the_module_refuses_when_it_is_made(option, wrong):
    with pytest.raises(ValueError, match=option):
        tdpo_ext.LinearTDPOLoss(**{option: wrong})
