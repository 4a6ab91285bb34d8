"""Files that serve one model from many replicas: compose, Kubernetes, or layers across machines.

``memory.py`` says what a replica needs, ``servers.py`` how each server is started, ``compose.py``,
``kubernetes.py``, ``nginx.py`` and ``rpc.py`` write, ``deploy.py`` puts a folder together. Every
replica checks the model's digests before it starts, and mounts it read-only.
"""
