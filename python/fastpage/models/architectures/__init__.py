"""One small module an architecture: `spec(config)`, `sources(spec)` and maybe `IGNORED`.

`spec` turns a Hugging Face config dict into a DecoderSpec. `sources` says from which Hugging Face
tensors each weight is made. IGNORED: endings of names of tensors that no model reads. The first
paragraph of its docstring, "Names: what they are", is its line in the README's table of models.
"""
