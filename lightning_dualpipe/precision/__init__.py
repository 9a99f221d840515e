"""Matrix multiplications: their number formats, and weight gradients that can wait.

Knows no model, no process group and no Lightning.
"""
