"""What attach_tdpo and an attached model say to those who call them wrongly."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from attached_models import lora, targets
from tiny_models import tiny_batch, tiny_model
from torch.nn.functional import pad

from tdpo_ext import LinearTDPOLoss, TDPOLoss
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo, detach_tdpo


@pytest.fixture(scope="module")
def given() -> SimpleNamespace:
    """An attached policy and reference, a batch, and what the reference said of it."""
    model, reference = attach_tdpo(tiny_model()), attach_tdpo(tiny_model(seed=1))
    batch = tiny_batch(model)
    asked = targets(model, reference, batch)
    return SimpleNamespace(
        model=model,
        reference=reference,
        inputs=batch["inputs"],
        labels=batch["labels"],
        shifted=pad(batch["labels"][:, 1:], (0, 1), value=-100),
        said=asked.reference,
        asked=asked,
    )


Attempt = Callable[[SimpleNamespace], Any]
WRONG_MODEL_OR_LOSS: dict[str, tuple[Attempt, type[Exception], str]] = {
    "no model": (
        lambda _: attach_tdpo(None),
        TypeError,
        "model must be a Hugging Face .* NoneType",
    ),
    "a name": (lambda _: attach_tdpo("gpt2"), TypeError, "got 'gpt2'; load it first"),
    "a class": (
        lambda _: attach_tdpo(transformers.LlamaForCausalLM),
        TypeError,
        "got the class LlamaForCausalLM; make one",
    ),
    "another module": (
        lambda _: attach_tdpo(torch.nn.Linear(2, 2)),
        TypeError,
        "got Linear; with another model call tdpo_ext.linear_tdpo_loss",
    ),
    "a wrapped model": (
        lambda _: attach_tdpo(torch.nn.DataParallel(tiny_model())),
        TypeError,
        r"got DataParallel; attach the model inside, before it is wrapped \(here .module\)",
    ),
    "no head": (
        lambda _: attach_tdpo(tiny_model().model),
        ValueError,
        "LlamaModel has no output embeddings; use a class with a head",
    ),
    "another head": (
        lambda _: attach_tdpo(transformers.LlamaForSequenceClassification(tiny_model().config)),
        ValueError,
        "LlamaForSequenceClassification has no output embeddings",
    ),
    "detach nothing": (lambda _: detach_tdpo(None), TypeError, "model must be a Hugging Face"),
    "the loss's class": (
        lambda _: attach_tdpo(tiny_model(), LinearTDPOLoss),
        TypeError,
        r"loss must be a LinearTDPOLoss or None .* got the class LinearTDPOLoss; its options are",
    ),
    "a loss of logits": (
        lambda _: attach_tdpo(tiny_model(), TDPOLoss()),
        TypeError,
        "got TDPOLoss",
    ),
    "a number": (lambda _: attach_tdpo(tiny_model(), 0.1), TypeError, r"got float; .*beta=\.\.\."),
    **{
        f"the loss's {name}": (
            lambda _, name=name, value=value: attach_tdpo(
                tiny_model(), LinearTDPOLoss(**{name: value})
            ),
            ValueError,
            f"loss must have {name}={default}, got {came}: .*; leave it out",
        )
        for name, value, default, came in (
            ("logit_scale", 0.5, "1.0", "0.5"),
            ("logit_softcap", 30.0, "None", "30.0"),
            ("reference_logit_scale", 1.0, "None", "1.0"),
            ("reference_logit_softcap", 2.0**20, "None", "1048576.0"),
            ("process_group", SimpleNamespace(), "None", "SimpleNamespace"),
        )
    },
}


def request(tdpo: Any, **more: Any) -> Attempt:
    """A call of the policy; ``tdpo`` may need what is given."""
    return lambda given: given.model(
        **given.inputs, **more, tdpo=tdpo(given) if callable(tdpo) else tdpo
    )


NO_REQUEST = r'tdpo must be a TDPOTargets or "head_inputs" \(HEAD_INPUTS\), got '
NO_REFERENCE = "reference must be the HeadInputs that an attached reference returns .* got "
WRONG_REQUEST: dict[str, tuple[Attempt, type[Exception], str]] = {
    "a word": (request("hidden"), TypeError, NO_REQUEST + "'hidden'"),
    "true": (request(True), TypeError, NO_REQUEST + "bool"),
    "the reference": (request(lambda given: given.said), TypeError, NO_REQUEST + "HeadInputs"),
    "labels": (request(lambda given: given.labels), TypeError, NO_REQUEST + "Tensor"),
    "a tuple": (request(lambda given: (*given.asked,)), TypeError, NO_REQUEST + "tuple"),
    "the targets' class": (
        lambda given: given.model(**given.inputs, tdpo=TDPOTargets),
        TypeError,
        NO_REQUEST + "the class TDPOTargets",
    ),
    "labels beside": (
        lambda given: given.model(**given.inputs, labels=given.labels, tdpo=given.asked),
        ValueError,
        "labels and tdpo were both given; labels go into TDPOTargets",
    ),
    "a tuple asked for": (
        request(lambda given: given.asked, return_dict=False),
        ValueError,
        "return_dict=False and tdpo were both given",
    ),
    "a part of the logits": (
        request(lambda given: given.asked, logits_to_keep=1),
        ValueError,
        r"labels have shape \(4, 7\), but the head takes \(4, 1\) .* leave logits_to_keep out",
    ),
    "in generate": (
        lambda given: given.model.generate(given.inputs["input_ids"], tdpo=given.asked),
        ValueError,
        "not used by the model: .*tdpo",
    ),
    "logits of the result": (
        lambda given: given.model(**given.inputs, tdpo=given.asked).logits,
        AttributeError,
        "with tdpo= there are no logits; call the model without it",
    ),
    "metrics of the result": (
        lambda given: given.model(**given.inputs, tdpo=given.asked).metrics(),
        AttributeError,
        r"call tdpo.metrics\(\)",
    ),
}


def targets_of(*fields: Any, **changes: Any) -> Attempt:
    """A call with targets that have other fields; those that are functions need what is given."""

    def attempt(given: SimpleNamespace) -> Any:
        def value(field: Any) -> Any:
            return field(given) if callable(field) else field

        made = TDPOTargets(*map(value, fields), **{k: value(v) for k, v in changes.items()})
        return given.model(**given.inputs, tdpo=made)

    return attempt


def said(**changes: Any) -> Attempt:
    """Targets with another reference."""

    def reference(given: SimpleNamespace) -> Any:
        return given.said.replace(**{k: v(given.said) for k, v in changes.items()})

    return targets_of(reference, lambda given: given.labels)


def labels(change: Callable[[torch.Tensor], Any]) -> Attempt:
    return targets_of(lambda given: given.said, lambda given: change(given.labels))


WRONG_TARGETS: dict[str, tuple[Attempt, type[Exception], str]] = {
    "no reference": (targets_of(None, None), TypeError, NO_REFERENCE + "NoneType"),
    "logits as reference": (targets_of(torch.zeros(4, 7, 61)), TypeError, NO_REFERENCE + "Tensor"),
    "an output as reference": (
        targets_of(lambda given: tiny_model()(**given.inputs)),
        TypeError,
        NO_REFERENCE + "CausalLMOutputWithPast",
    ),
    "swapped": (
        targets_of(lambda given: given.labels, lambda given: given.said),
        TypeError,
        NO_REFERENCE + "Tensor",
    ),
    "no labels": (
        targets_of(lambda given: given.said),
        ValueError,
        "needs labels or shift_labels, got neither",
    ),
    "both labels": (
        targets_of(lambda given: given.said, lambda g: g.labels, lambda g: g.shifted),
        ValueError,
        "needs labels or shift_labels, got both",
    ),
    "a list": (labels(torch.Tensor.tolist), TypeError, "labels must be a tensor, got list"),
    "floats": (labels(torch.Tensor.float), TypeError, "labels must have dtype int64, int32"),
    "a mask": (labels(lambda x: x > 0), TypeError, "labels must have dtype int64, int32, got bool"),
    "cut labels": (
        labels(lambda x: x[:, 1:]),
        ValueError,
        r"labels have shape \(4, 6\), but the head takes \(4, 7\) positions; labels and "
        "shift_labels are as long as input_ids, nothing is cut off",
    ),
    "long labels": (labels(lambda x: torch.cat([x, x], 1)), ValueError, r"shape \(4, 14\)"),
    "flat labels": (labels(torch.flatten), ValueError, r"labels have shape \(28,\)"),
    "labels of a half": (labels(lambda x: x[:2]), ValueError, r"labels have shape \(2, 7\)"),
    "labels outside": (labels(lambda x: x + 100), IndexError, r"must lie in \[0, 61\)"),
    "labels elsewhere": (labels(lambda x: x.to("meta")), ValueError, "labels on meta; move them"),
    "another batch": (
        said(hidden=lambda x: x.hidden[:2]),
        ValueError,
        r"are of \(2, 7\) positions, the policy's of \(4, 7\); give both models the same batch",
    ),
    "another length": (
        said(hidden=lambda x: x.hidden[:, 1:]),
        ValueError,
        r"are of \(4, 6\) positions, the policy's of \(4, 7\); give both models the same batch",
    ),
    "another vocabulary": (
        said(weight=lambda x: x.weight[:50]),
        ValueError,
        "reference's vocabulary has 50 tokens, the policy's 61; .*resize_token_embeddings",
    ),
    "another width": (
        said(weight=lambda x: x.weight[:, :8]),
        ValueError,
        r"reference_weight must have shape \[V, H\] with the H of reference_hidden",
    ),
    "another device": (
        said(hidden=lambda x: x.hidden.to("meta")),
        ValueError,
        "the reference's on meta, its head on cpu, labels on cpu; move them to one device",
    ),
    "a head elsewhere": (
        said(weight=lambda x: x.weight.to("meta")),
        ValueError,
        "its head on meta",
    ),
    "a bias of another size": (
        said(bias=lambda x: torch.zeros(3)),
        ValueError,
        r"reference_bias must have shape \[V\] = \[61\], got \[3\]",
    ),
    "integers": (
        targets_of(lambda given: given.said.to(torch.int64), lambda given: given.labels),
        TypeError,
        "reference_hidden must have dtype float32",
    ),
    "only the reference in float64": (
        targets_of(lambda given: given.said.to(torch.float64), lambda given: given.labels),
        TypeError,
        "must both be float64 or neither",
    ),
    "packed, in rows": (
        targets_of(
            lambda given: given.said, lambda given: given.labels, cu_seqlens=torch.tensor([0, 7])
        ),
        ValueError,
        r"with cu_seqlens the model takes one row \[1, total\] and labels .*, got \(4, 7\)",
    ),
}


def changed(change: Callable[[Any], Any]) -> Attempt:
    """A call of a model that is no longer what attach_tdpo has seen."""

    def attempt(given: SimpleNamespace) -> Any:
        model = attach_tdpo(tiny_model())
        return (change(model) or model)(**given.inputs, tdpo=given.asked)

    return attempt


def share_head(model: Any) -> None:
    other = tiny_model()
    other.lm_head = model.lm_head
    attach_tdpo(other)


def keep_wrapper(model: Any) -> None:
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    detach_tdpo(model)


HEAD_CHANGED = "head has changed since attach_tdpo .* call attach_tdpo last"
CHANGED_MODEL: dict[str, tuple[Attempt, type[Exception], str]] = {
    "resized": (
        changed(lambda model: model.resize_token_embeddings(70, mean_resizing=False) and None),
        RuntimeError,
        HEAD_CHANGED,
    ),
    "adapter on the head": (
        changed(lambda model: lora(model, target_modules=["lm_head"])),
        RuntimeError,
        HEAD_CHANGED,
    ),
    "a copy of the head": (
        changed(lambda model: lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])),
        RuntimeError,
        HEAD_CHANGED,
    ),
    "a head of two": (changed(share_head), RuntimeError, "give each a head module of its own"),
    "detached below a wrapper": (changed(keep_wrapper), RuntimeError, "the model was detached"),
    "a replica": (
        changed(lambda model: model.__dict__.update(_is_replica=True)),
        RuntimeError,
        "does not work under nn.DataParallel.*DistributedDataParallel",
    ),
}


def statistics(given: SimpleNamespace) -> Any:
    return attach_tdpo(tiny_model(), None)(**given.inputs, tdpo=given.asked)


def encoder_decoder(_: SimpleNamespace) -> Any:
    model = attach_tdpo(tiny_model("t5-untied"))
    batch = tiny_batch(model)
    said = model(**batch["inputs"], tdpo=HEAD_INPUTS)
    return model(**batch["inputs"], tdpo=TDPOTargets(said, batch["labels"]))


OTHER_KINDS: dict[str, tuple[Attempt, type[Exception], str]] = {
    "statistics": (statistics, ValueError, "statistics need shift_labels"),
    "encoder-decoder": (encoder_decoder, ValueError, "give an encoder-decoder shift_labels"),
}
ALL = {
    **WRONG_MODEL_OR_LOSS,
    **WRONG_REQUEST,
    **WRONG_TARGETS,
    **CHANGED_MODEL,
    **OTHER_KINDS,
}


@pytest.mark.parametrize("name", ALL)
def test_a_message_names_what_came_and_what_to_do(name: str, given: SimpleNamespace) -> None:
    attempt, error, message = ALL[name]
    with pytest.raises(error, match=message):
        attempt(given)


def test_the_model_still_works_after_all_that(given: SimpleNamespace) -> None:
    for attempt, *_ in WRONG_TARGETS.values():
        with pytest.raises((ValueError, TypeError, IndexError)):
            attempt(given)
    fresh = attach_tdpo(tiny_model())(**given.inputs, tdpo=given.asked).loss
    assert torch.equal(given.model(**given.inputs, tdpo=given.asked).loss, fresh)
