"""The laboratory: train the same model with several methods over several seeds, record it, compare, report.

Runs write plain records; tables, figures and reports are pure functions of those records. Needs the extra ``lab``;
the core never imports this package.
"""
