"""Other people's pipelines and networks: one module a host, which imports its host when it is used.

``sklearn``, ``pyod``, ``anomalib``, ``diffusers``; for features, ``timm`` and ``yamnet``.
scikit-learn comes with this library; the other hosts with ``pip install 'diffad_fast[plugins]'``.
"""
