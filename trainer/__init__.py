"""A compact distributed trainer whose checkpoints the rest of mconv converts. Needs torch.

To read it, from the run to the bytes: ``loop.py`` (a step, and the hooks around it), ``build.py``,
``model.py`` with ``attention.py`` and ``moe.py``, ``mesh.py``, ``parallel.py`` with ``tensor.py``,
``pipeline.py``, ``engine.py``, ``optim.py``, ``data.py``, ``init.py``, ``resume.py`` with
``checkpoint.py``. Beside this core, each to be read alone:

* ``settings/``: the TOML file of a run, and which parallel degrees are possible;
* ``text/``: text to tokens; ``lora/``: adapters;
* ``planning/``, ``measure/``, ``delivery/``: before a run, while it goes on, after it.
"""
