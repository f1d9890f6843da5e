"""Benchmarks: ``python -m benchmarks SUITE``. Results, tables and plots lie in benchmarks/results/.

``case.py`` says what a case is, ``cases/`` declares them all, one file a family. ``harness.py``
runs a case: ``verify.py`` holds every contender against the float64 reference, ``timing.py`` times
the right ones in rounds, ``counting.py`` counts their work, ``ceilings.py`` measures what the
machine could do, ``stats.py`` judges the ratios. ``suites.py`` puts cases together;
``end_to_end.py`` and ``compile_report.py`` are suites with work of their own, ``quality/`` the
commands `quality` and `audio`.
``results.py`` writes JSON, from which ``tables.py``, ``plots.py``, ``compare.py`` and
``readme.py`` draw. ``test_cases.py`` runs the same cases under pytest-benchmark; ``gpu_check.sh``
is `make gpu-check`.
"""
