"""Sphinx: ``sphinx-build -W docs build/docs`` after ``pip install -c constraints-cpu.txt -e '.[docs]'``."""

project = "lightning-dualpipe"
author = "The lightning-dualpipe contributors"
extensions = ["myst_parser"]
html_theme = "furo"
myst_heading_anchors = 3
