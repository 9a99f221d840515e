"""What Transformer Engine 2.20 does, as far as ``te_backend`` uses it, on any machine and in plain torch.

Products are those of ``precision.reference``; the rest is a library that forgets and overwrites where the real one
does. Its signatures are compared with the real ones (``test_te_signatures.py``).
"""

__version__ = "2.20.2"
