"""What a reference's hidden states depend on beside the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tdpo_ext.integrations.adapters import adapter_layers, has_adapters
from tdpo_ext.integrations.cached_reference.run import autocast_of
from tdpo_ext.integrations.models import dtype_name, language_model, unwrapped
from tdpo_ext.integrations.parameters import gathered


def reference_fingerprint(
    model: nn.Module, *, of_policy: bool = False, accelerator: Any = None
) -> dict[str, str]:
    """All that a reference's hidden states depend on beside the tokens, as strings.

    A parameter is represented by the exact sum of its bits and 64 of its values. Two checkpoints
    differ in that, it is the same on every device, and it costs reading the parameters once, where
    they are.

    Args:
        model: the reference; a PEFT policy with ``of_policy``.
        of_policy: leave out the adapters that a policy's own reference does not use.
        accelerator: the ``Accelerator`` under whose autocast the reference runs; None: the autocast
            in force.

    Returns:
        A few names, each with its value.
    """
    inner = language_model(unwrapped(model))
    with autocast_of(accelerator):
        kind = inner.device.type if accelerator is None else accelerator.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else "off"
    tensors = [*_tensors(unwrapped(model), of_policy)]
    values = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        values.update(_summary(tensor).encode())
    adapters = _adapters(unwrapped(model), of_policy)
    return {
        "model": type(inner).__name__,
        "config": _digest(_lasting(inner.config.to_dict())),
        **({"adapters": _digest(adapters)} if adapters else {}),
        "parameters": values.hexdigest(),
        "dtype": ", ".join(sorted({dtype_name(x.dtype) for x in tensors})),
        "autocast": dtype_name(autocast),
        "attention": str(getattr(inner.config, "_attn_implementation", None)),
        "transformers": transformers.__version__,
    }


def _digest(values: Any) -> str:
    """A short string for what JSON can hold, sets and other objects as text."""
    text = json.dumps(values, sort_keys=True, default=_as_text)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _as_text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _adapters(model: Any, of_policy: bool) -> list[Any]:
    """The configs of the adapters that the reference uses, and their factors in each layer."""
    if not has_adapters(model):
        return []
    configs, factors = model.peft_config, []
    ref = [name for name in configs if name == "ref"]
    for layer in adapter_layers(model):
        active = ref if of_policy else [] if layer.disable_adapters else layer.active_adapters
        scaling = vars(layer).get("scaling")
        scaling = scaling if isinstance(scaling, dict) else {}
        factors.append({name: scaling.get(name) for name in active})
    if not factors:  # prompts have no layers
        disabled = getattr(model, "_adapters_disabled", False)
        factors = [dict.fromkeys(ref if of_policy else [] if disabled else [model.active_adapter])]
    used = set[str]().union(*factors) & configs.keys()
    return [{name: _lasting(configs[name].to_dict()) for name in used}, factors] if used else []


def _lasting(config: Any) -> Any:
    """A config without the fields that hidden states do not depend on."""
    if not isinstance(config, dict):
        return config
    return {key: _lasting(x) for key, x in config.items() if key not in _FLEETING}


_FLEETING = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "output_router_logits",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "base_model_name_or_path",  # of adapters' configs, up to the last
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
}


def _tensors(model: nn.Module, of_policy: bool) -> Iterator[Tensor]:
    """The parameters and buffers that are saved with the model, each once.

    Those of adapters that a policy's own reference does not use are left out.
    """
    idle = _idle_adapters(model) if of_policy else set[int]()
    seen = set(idle)
    for module in model.modules():
        unsaved = module._non_persistent_buffers_set
        saved = [buffer for name, buffer in module._buffers.items() if name not in unsaved]
        for tensor in (*module._parameters.values(), *saved):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _idle_adapters(model: Any) -> set[int]:
    """The ``id`` of every tensor that belongs to an adapter other than "ref"."""
    adapters, idle = {*model.peft_config}, set[int]()
    for module in model.modules():
        # PEFT keeps adapters' tensors in dictionaries whose keys are the names of the adapters.
        children = {**module._modules, **module._parameters, **module._buffers}
        if not isinstance(module, _DICTIONARIES) or not children.keys() <= adapters:
            continue
        for name, child in children.items():
            if name != "ref" and isinstance(child, nn.Module):
                idle.update(id(x) for x in (*child.parameters(), *child.buffers()))
            elif name != "ref":
                idle.add(id(child))
    return idle


_DICTIONARIES = (nn.ModuleDict, nn.ParameterDict)


@torch.no_grad()
def _summary(tensor: Tensor) -> str:
    """Dtype, shape, the sum of the bits and 64 values; the same on every device."""
    with gathered(tensor) as whole:
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = whole.detach().contiguous().view(integer[whole.element_size()]).flatten()
        some = bits[:: max(1, bits.numel() // 64)]
        return f"{whole.dtype} {[*whole.shape]} {bits.sum(dtype=torch.int64)} {some.tolist()};"
