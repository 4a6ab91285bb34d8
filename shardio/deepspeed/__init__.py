"""DeepSpeed checkpoints: rank files to whole tensors, without DeepSpeed.

``folder`` knows the file names, ``states`` what one file holds, ``zero12``, ``zero3`` and ``zero0``
how the optimizer is cut, ``experts``, ``pipeline`` and ``tensor_parallel`` how the model is, and
``assembly`` puts a folder together. Layouts follow DeepSpeed 0.5 to 0.19
(github.com/deepspeedai/DeepSpeed, ``runtime/engine.py`` and ``runtime/zero/``).
"""
