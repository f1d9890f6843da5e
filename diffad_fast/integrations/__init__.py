"""Other people's pipelines: one module a host, which imports its host and is imported by nothing.

``sklearn``, ``pyod``, ``anomalib``, ``diffusers``. scikit-learn comes with this library; the other
hosts with ``pip install 'diffad_fast[plugins]'``.
"""
