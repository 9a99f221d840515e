"""How the processes of a run are divided, and what they exchange outside the pipeline.

Knows no model, no schedule and no Lightning.
"""
