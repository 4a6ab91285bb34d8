"""Ollama as a target: Modelfiles, proven prompt templates, and models placed into its store.

``modelfile*.py`` speak the Modelfile grammar, ``go_template/`` runs Ollama's template language,
``induce*.py`` turn a Jinja chat template into a Go one and ``proof.py`` compares the two,
``store*.py`` and ``server.py`` install. Facts of Ollama are those of its releases from 0.1 to 0.34;
where they differ the modules say so.
"""
