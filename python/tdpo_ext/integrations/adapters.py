"""PEFT: a policy as its own reference, and the virtual tokens of prompt tuning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from tdpo_ext.integrations.models import is_encoder_decoder, unwrapped


@contextmanager
def reference_model(policy: nn.Module, reference: nn.Module | None) -> Iterator[nn.Module]:
    """The module to call as the reference: ``reference``, or the PEFT policy as its own reference.

    Args:
        policy: the trained model, wrapped (DDP, DeepSpeed, torch.compile) or not.
        reference: a model of its own; None: the policy's adapter "ref" or no adapter.
    """
    if reference is not None:
        yield reference
    else:
        with ReferenceAdapter(unwrapped(policy)):
            yield policy


def has_adapters(model: nn.Module) -> bool:
    """True if PEFT can switch adapters of the model off, so that it can be its own reference.

    ``peft_config`` alone does not tell: a merged model may still have it, and no adapter.
    """
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    if isinstance(model, PeftModel):
        for config in model.peft_config.values():  # these adapters have no layers
            if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
                return True
    return any(True for _ in adapter_layers(model))


def adapter_layers(model: nn.Module) -> Iterator[Any]:
    """The modules in which PEFT switches adapters."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    yield from (module for module in model.modules() if isinstance(module, kinds))


class ReferenceAdapter:
    """Inside it a PEFT model is its own reference: adapter "ref" if it has one, else no adapter.

    It changes only what adapter layers read in their forward, and restores that after errors too.
    PEFT's own functions (``set_adapter``, ``disable_adapter``) also set requires_grad, know one
    active adapter alone, and do not merge again what they have unmerged.

    Args:
        model: a PEFT model that nothing wraps.

    Raises:
        ValueError: on entering, if the model has no adapters.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        if not has_adapters(self.model):
            raise ValueError(
                f"the policy ({type(self.model).__name__}) has no adapters (merged?), so it cannot "
                "be its own reference; pass a reference model"
            )
        self.undo = ExitStack()
        try:
            self._switch("ref" if "ref" in self.model.peft_config else None)
        except BaseException:
            self.undo.close()
            raise

    def __exit__(self, *error: Any) -> None:
        self.undo.close()

    def _switch(self, adapter: str | None) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._switch_whole_model(adapter)
        for module in [*adapter_layers(self.model)]:
            if module.merged_adapters:
                self._unmerge(module)
            self._set(module, "_disable_adapters", adapter is None)
            if adapter is not None:
                # A module of modules_to_save has a copy for some adapters; for others it is itself.
                has = isinstance(module, BaseTunerLayer) or adapter in module._adapters
                self._set(module, "_active_adapter", [adapter] if has else [])

    def _switch_whole_model(self, adapter: str | None) -> None:
        """Switch what PEFT keeps outside the layers, and adapters that have no layers."""
        configs = self.model.peft_config
        tuner = getattr(self.model, "base_model", None)
        if any(getattr(config, "is_adaption_prompt", False) for config in configs.values()):
            self._swap_attention(tuner, adapter)
        if adapter is None:
            _warn_of_biases(configs)
        if adapter is None and any(c.is_prompt_learning for c in configs.values()):
            self._set(self.model, "forward", tuner.forward)  # type: ignore[union-attr]
        for module in (self.model, tuner):
            known = {} if module is None else vars(module)
            if adapter is not None and "active_adapter" in known:
                self._set(module, "active_adapter", adapter)
            for name in ("_adapters_disabled", "disabled"):  # PEFT's wrapper; X-LoRA
                if name in known:
                    self._set(module, name, adapter is None)

    def _swap_attention(self, tuner: Any, adapter: str | None) -> None:
        """Adaption prompts replace whole attention modules, so only PEFT's functions can switch."""
        enabled, before = tuner._enabled, tuner._active_adapter
        if adapter is None and enabled:
            tuner.disable_adapter_layers()
            self.undo.callback(tuner.enable_adapter_layers)
        if adapter is not None and not enabled:
            tuner.enable_adapter_layers()
            self.undo.callback(tuner.disable_adapter_layers)
        if adapter is not None:
            tuner.set_adapter(adapter)
            self.undo.callback(tuner.set_adapter, before)

    def _set(self, module: Any, name: str, value: Any) -> None:
        """Set an attribute until the end; one that the class has is not touched."""
        if name in vars(module):
            self.undo.callback(setattr, module, name, vars(module)[name])
        else:
            self.undo.callback(delattr, module, name)
        setattr(module, name, value)

    def _unmerge(self, layer: Any) -> None:
        """Unmerge, and restore the merged layer at the end: merging again would round otherwise."""
        for module in [*layer.modules()]:
            for held in vars(module).values():  # parameters, buffers, modules, names, caches
                if isinstance(held, (dict, list)):
                    self.undo.callback(_refill, held, held.copy())
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self.undo.callback(_rewrite, tensor, tensor.data, tensor.data.clone())
        layer.unmerge()


def _warn_of_biases(configs: Mapping[str, Any]) -> None:
    for name, config in configs.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            warnings.warn(
                f"adapter {name!r} has bias={bias!r}: it trains biases of the base model, so the "
                "model without adapters does not stay the reference that it was; use "
                'bias="none", or pass a separate reference model',
                stacklevel=2,
            )


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    (container.update if isinstance(container, dict) else container.extend)(contents)


def _rewrite(tensor: Tensor, data: Tensor, contents: Tensor) -> None:
    tensor.data = data
    data.copy_(contents)


def virtual_tokens(model: Any) -> int:
    """The number of virtual tokens that a PEFT model puts before each sequence its head sees."""
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0
    # Prefix tuning adds keys and values instead. A prompt for an encoder never reaches the decoder.
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind in ("PREFIX_TUNING", "CARTRIDGE") or is_encoder_decoder(model):
        return 0
    return int(config.num_virtual_tokens)
