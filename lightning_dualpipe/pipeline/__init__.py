"""Cut a model into stages and run it as a pipeline."""
