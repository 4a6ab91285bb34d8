"""What the readers of Megatron-LM's formats share: names, settings, cuts, optimizer layouts.

Source: Megatron-LM core 0.9 to 0.19 (``megatron/core/transformer``, ``megatron/training/
checkpointing.py``, ``megatron/core/optimizer``) and the older ``megatron/model`` tree. Both formats
(legacy ``torch``, ``torch_dist``) end in one spelling, described in ``names``.
"""
