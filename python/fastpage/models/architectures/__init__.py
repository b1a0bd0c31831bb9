"""One small module an architecture: `spec(config)`, `sources(spec)`, maybe `ROOTS`, `IGNORED`.

`spec` turns a Hugging Face config dict into a DecoderSpec. `sources` says from which Hugging Face
tensors each weight is made. ROOTS, IGNORED: see `fastpage.models.Architecture`. The first paragraph
of its docstring, "Names: what they are", is its line in the README's table of models.
"""
