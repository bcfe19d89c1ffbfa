"""What draws the sequences of training: the ``Sampler`` protocol, transformers and the engine."""
