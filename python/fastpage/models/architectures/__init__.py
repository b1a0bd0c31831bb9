"""One small module an architecture: `spec(config)` and `sources(spec)`.

`spec` turns a Hugging Face config dict into a DecoderSpec. `sources` maps canonical weight names
to the Hugging Face tensors that, concatenated along their first dimension, make them.
"""
