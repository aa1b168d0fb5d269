"""TDPO inside models and trainers that people already use. ``tdpo_ext`` itself imports none of it.

The files, from the ground up:

- ``models``, ``parameters``, ``heads``: facts about a Hugging Face model, its weights and its head.
  ``hidden``: the head's inputs, all that logits are made of. ``adapters``: PEFT.
- ``stubs``, ``probe``: measure the scale and softcap that a model applies to its logits.
- ``classes``, ``targets``, ``attachment``, ``attach``: ``attach_tdpo``, the loss inside a model's
  forward.
- ``preferences``, ``empty_pairs``, ``streams``: from examples to batches of whole pairs.
- ``metrics``, ``evaluation``, ``steps``: what every trainer gets.
- ``reference_cache``: hidden states on disk. ``cached_reference``: a reference that runs once.
- ``transformers``, ``trl`` with ``trl_options``: the two trainers.
"""
